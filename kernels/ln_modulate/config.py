"""Launch choices as plain data: no autotuning in a user's first step.

Keyword arguments are what ``bench/tune.py`` varies; ``tuned.json`` holds what it found better than a default.
"""

from dataclasses import dataclass

from ..launches import columns

MAX_D = 8192
"""Widest row a program holds in registers."""


@dataclass(frozen=True, kw_only=True)
class LaunchConfig:
    """``block_d``: columns a program holds; ``programs``: per sample; ``num_warps`` of each program;
    ``num_stages``: rows on their way at a time."""

    block_d: int
    programs: int
    num_warps: int
    num_stages: int


def launch_config(
    D: int, batch: int, tokens: int, *, each: int = 16, programs: int = 2048, num_stages: int = 1
) -> LaunchConfig:
    """For rows of width ``D``, ``batch`` samples of about ``tokens`` tokens; ``programs`` in all, at most.

    16 numbers to ``each`` thread keep a row and its modulation in registers; enough programs to give each of
    a large GPU's 132 to 148 multiprocessors several, and at least four rows to each program. The defaults are
    not measured on a GPU.
    """
    block_d = columns(D)
    num_warps = min(16, max(1, block_d // (32 * each)))
    of_sample = max(1, min(-(-tokens // 4), -(-programs // max(batch, 1))))
    return LaunchConfig(block_d=block_d, programs=of_sample, num_warps=num_warps, num_stages=num_stages)


def thin_config(D: int, batch: int, tokens: int, *, each: int = 8, **choice: int) -> LaunchConfig:
    """With half as many numbers a thread: one 128-bit load of a half type.

    For the gated residual alone, which forms no statistics (with more, the compiler for sm_100 spills), and
    for the gated backward pass, which holds three sums and a gate besides the row (with more it takes 168
    registers, and of ragged samples it spills on sm_80 and sm_90).
    """
    return launch_config(D, batch, tokens, each=each, **choice)
