"""Launch choices as plain data: no autotuning in a user's first step.

Keyword arguments are what ``bench/tune.py`` varies; ``tuned.json`` holds what it found better than a default.
"""

from dataclasses import dataclass

from ..launches import columns


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
    """``block_o`` rows by ``block_d`` columns at a time."""

    block_o: int
    block_d: int
    num_warps: int


def weight_config(
    rows: int, D: int, *, block_o: int = 16, block_d: int = 128, num_warps: int = 4
) -> WeightConfig:
    """For a weight [rows, D]: 72 programs or more for XL/2's. The defaults are not measured on a GPU."""
    return WeightConfig(block_o=block_o, block_d=min(block_d, columns(D)), num_warps=num_warps)
