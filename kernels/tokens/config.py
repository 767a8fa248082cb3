"""Launch choices as plain data, so that a user's first step does no autotuning.

``bench/tune.py`` varies the keyword arguments; ``tuned.json`` holds the choices it found better than the
defaults.
"""

from dataclasses import dataclass

from ..launches import columns

MAX_D = 8192
"""The widest token that a program holds in registers."""


@dataclass(frozen=True, kw_only=True)
class LaunchConfig:
    """A program holds ``block_d`` columns; ``parts`` programs share the samples of one position."""

    block_d: int
    parts: int
    num_warps: int


@dataclass(frozen=True, kw_only=True)
class RowConfig:
    """A program moves ``block_d`` columns and searches ``block_k`` ids at a time."""

    block_d: int
    block_k: int
    num_warps: int


def row_config(D: int, *, each: int = 16, block_k: int = 256) -> RowConfig:
    """Launch choices for kernels that move one row of width ``D`` per program, ``each`` numbers per thread.

    The defaults are not measured on a GPU.
    """
    block_d = columns(D)
    return RowConfig(block_d=block_d, block_k=block_k, num_warps=min(16, max(1, block_d // (32 * each))))


def launch_config(D: int, batch: int, tokens: int, *, each: int = 16, programs: int = 1024) -> LaunchConfig:
    """Launch choices for ``batch`` samples of ``tokens`` tokens of width ``D``.

    Each program keeps its position's embedding in registers and walks the samples. There are about a thousand
    programs, several per multiprocessor of a large GPU. The defaults are not measured on a GPU.
    """
    block_d = columns(D)
    parts = max(1, min(batch, -(-programs // max(tokens, 1))))
    return LaunchConfig(block_d=block_d, parts=parts, num_warps=min(16, max(1, block_d // (32 * each))))
