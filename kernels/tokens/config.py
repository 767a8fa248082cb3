"""Launch choices as plain data: no autotuning in a user's first step.

Keyword arguments are what ``bench/tune.py`` varies; ``tuned.json`` holds what it found better than a default.
"""

from dataclasses import dataclass

from ..launches import columns

MAX_D = 8192
"""Widest token a program holds in registers."""


@dataclass(frozen=True, kw_only=True)
class LaunchConfig:
    """``block_d``: columns a program holds; ``parts``: programs that share the samples of one position."""

    block_d: int
    parts: int
    num_warps: int


@dataclass(frozen=True, kw_only=True)
class RowConfig:
    """``block_d``: columns a program moves; ``block_k``: ids it looks through at a time."""

    block_d: int
    block_k: int
    num_warps: int


def row_config(D: int, *, each: int = 16, block_k: int = 256) -> RowConfig:
    """For kernels that move one row of width ``D`` a program, ``each`` thread so many numbers.

    The defaults are not measured on a GPU.
    """
    block_d = columns(D)
    return RowConfig(block_d=block_d, block_k=block_k, num_warps=min(16, max(1, block_d // (32 * each))))


def launch_config(D: int, batch: int, tokens: int, *, each: int = 16, programs: int = 1024) -> LaunchConfig:
    """For ``batch`` samples of ``tokens`` tokens of width ``D``.

    Each program keeps its position's embedding in registers and walks samples; there are about a thousand
    programs, several for each multiprocessor of a large GPU. The defaults are not measured on a GPU.
    """
    block_d = columns(D)
    parts = max(1, min(batch, -(-programs // max(tokens, 1))))
    return LaunchConfig(block_d=block_d, parts=parts, num_warps=min(16, max(1, block_d // (32 * each))))
