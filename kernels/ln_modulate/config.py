"""Launch choices as plain data, so that a user's first step does no autotuning.

``bench/tune.py`` varies the keyword arguments; ``tuned.json`` holds the choices it found better than the
defaults.
"""

from dataclasses import dataclass

from ..launches import columns

MAX_D = 8192
"""The widest row that a program holds in registers."""


@dataclass(frozen=True, kw_only=True)
class LaunchConfig:
    """``block_d``: columns that a program holds. ``programs``: programs per sample. ``num_warps``: warps per
    program. ``num_stages``: rows in flight at a time."""

    block_d: int
    programs: int
    num_warps: int
    num_stages: int


def launch_config(
    D: int, batch: int, tokens: int, *, each: int = 16, programs: int = 2048, num_stages: int = 1
) -> LaunchConfig:
    """Launch choices for ``batch`` samples of about ``tokens`` rows of width ``D``.

    With ``each`` = 16 numbers per thread, a row and its modulation stay in registers. About ``programs``
    programs run in all, several for each of the 132 to 148 multiprocessors of a large GPU, but only so many
    that each has about four rows or more. The defaults were chosen by compiling; ``kernels/tuned.json`` holds
    the choices measured on sm_90.
    """
    block_d = columns(D)
    num_warps = min(16, max(1, block_d // (32 * each)))
    of_sample = max(1, min(-(-tokens // 4), -(-programs // max(batch, 1))))
    return LaunchConfig(block_d=block_d, programs=of_sample, num_warps=num_warps, num_stages=num_stages)


def thin_config(D: int, batch: int, tokens: int, *, each: int = 8, **choice: int) -> LaunchConfig:
    """:func:`launch_config` with half as many numbers per thread: one 128-bit load of a half type.

    It serves the gated residual alone, which computes no statistics (with more numbers per thread, the
    compiler for sm_100 spills), and the gated backward pass, which holds three sums and a gate besides the
    row (with more, it takes 168 registers, and for ragged batches it spills on sm_80 and sm_90).
    """
    return launch_config(D, batch, tokens, each=each, **choice)
