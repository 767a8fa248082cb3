"""Launch choices as plain data, so that a user's first step does no autotuning.

``bench/tune.py`` varies the keyword arguments; ``tuned.json`` holds the choices it found better than the
defaults.
"""

from dataclasses import dataclass

from ..launches import columns

MOST_PARTS = 1024
"""Most partial sums of rows. Each is written once and read again."""


@dataclass(frozen=True, kw_only=True)
class LaunchConfig:
    """``programs`` programs share the rows. Each takes one row of ``block_d`` numbers at a time, with
    ``num_stages`` rows in flight."""

    block_d: int
    programs: int
    num_warps: int
    num_stages: int


def rows_config(
    rows: int, D: int, *, each: int = 16, programs: int = 2048, num_stages: int = 1
) -> LaunchConfig:
    """Launch choices for ``rows`` rows of ``D`` numbers, with ``each`` numbers per thread.

    The default of 16 is two 128-bit loads of a half type. The defaults are not measured on a GPU.
    """
    block_d = columns(D)
    num_warps = max(1, min(16, block_d // (32 * each)))
    return LaunchConfig(
        block_d=block_d, programs=max(1, min(rows, programs)), num_warps=num_warps, num_stages=num_stages
    )


@dataclass(frozen=True, kw_only=True)
class WeightConfig:
    """Tiles of ``block_o`` rows by ``block_d`` columns. The kernel for the scales, which runs before, reads
    ``row_block`` numbers of a row at a time."""

    block_o: int
    block_d: int
    num_warps: int
    row_block: int
    row_warps: int


def weight_config(
    D: int, *, block_o: int = 32, block_d: int = 128, num_warps: int = 4, row_warps: int = 4
) -> WeightConfig:
    """Launch choices for a weight with rows of ``D`` numbers; the weights of XL/2 have 324 tiles or more.

    The defaults are not measured on a GPU.
    """
    widest = columns(D)
    return WeightConfig(
        block_o=block_o, block_d=min(block_d, widest), num_warps=num_warps, row_block=min(widest, 4096),
        row_warps=min(row_warps, max(1, widest // 256)),
    )  # fmt: skip
