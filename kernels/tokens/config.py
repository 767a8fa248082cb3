"""Launch choices as plain data: no autotuning in a user's first step."""

from dataclasses import dataclass

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


def row_config(D: int) -> RowConfig:
    """For kernels that move one row of width ``D`` a program. Not yet tuned on a GPU."""
    block_d = max(32, 1 << (D - 1).bit_length())
    return RowConfig(block_d=block_d, block_k=256, num_warps=min(16, max(1, block_d // 512)))


def launch_config(D: int, batch: int, tokens: int) -> LaunchConfig:
    """For ``batch`` samples of ``tokens`` tokens of width ``D``.

    Each program keeps its position's embedding in registers and walks samples; there are about a thousand
    programs, several for each multiprocessor of a large GPU. Not yet tuned on a GPU.
    """
    block_d = max(32, 1 << (D - 1).bit_length())
    parts = max(1, min(batch, -(-1024 // max(tokens, 1))))
    return LaunchConfig(block_d=block_d, parts=parts, num_warps=min(16, max(1, block_d // 512)))
