"""Launch choices as plain data: no autotuning in a user's first step.

Keyword arguments are what ``bench/tune.py`` varies; ``tuned.json`` holds what it found better than a default.
"""

from dataclasses import dataclass

from ..launches import columns

MOST_PARTS = 1024
"""Partial sums of rows, each of which is written and read again."""


@dataclass(frozen=True, kw_only=True)
class LaunchConfig:
    """A row of ``block_d`` numbers at a time; ``programs`` share the rows; ``num_stages``: rows on their way
    at a time."""

    block_d: int
    programs: int
    num_warps: int
    num_stages: int


def rows_config(
    rows: int, D: int, *, each: int = 16, programs: int = 2048, num_stages: int = 1
) -> LaunchConfig:
    """For ``rows`` rows of ``D`` numbers, ``each`` of them to a thread, which is two 128-bit loads of a half
    type. The defaults are not measured on a GPU."""
    block_d = columns(D)
    num_warps = max(1, min(16, block_d // (32 * each)))
    return LaunchConfig(
        block_d=block_d, programs=max(1, min(rows, programs)), num_warps=num_warps, num_stages=num_stages
    )


@dataclass(frozen=True, kw_only=True)
class WeightConfig:
    """Tiles of ``block_o`` rows by ``block_d`` columns; before, for the scales, ``row_block`` numbers of a
    row at a time."""

    block_o: int
    block_d: int
    num_warps: int
    row_block: int
    row_warps: int


def weight_config(
    D: int, *, block_o: int = 32, block_d: int = 128, num_warps: int = 4, row_warps: int = 4
) -> WeightConfig:
    """For a weight of rows of D numbers: 324 tiles or more for those of XL/2. The defaults are not measured
    on a GPU."""
    widest = columns(D)
    return WeightConfig(
        block_o=block_o, block_d=min(block_d, widest), num_warps=num_warps, row_block=min(widest, 4096),
        row_warps=min(row_warps, max(1, widest // 256)),
    )  # fmt: skip
