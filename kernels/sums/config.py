"""Launch choices as plain data, so that a user's first step does no autotuning.

``bench/tune.py`` varies the keyword arguments; ``tuned.json`` holds the choices it found better than the
defaults.
"""

from dataclasses import dataclass

ANY = 0
"""The one shape class for all widths: a single choice serves all of them."""

CHUNKS = {"widest": 16, "block_p": 128}
"""Choices for the second pass, which adds up the chunks. It has few rows, at most 128 of them in flight at
once; narrow column blocks share the work among many multiprocessors."""


@dataclass(frozen=True, kw_only=True)
class LaunchConfig:
    """Tiles of ``block_p`` rows by ``block_d`` columns. ``chunks`` programs share a column, each with its own
    partial sum; ``num_stages`` tiles are in flight at a time."""

    block_p: int
    block_d: int
    chunks: int
    num_warps: int
    num_stages: int


def launch_config(
    rows: int,
    D: int,
    *,
    block_p: int = 32,
    widest: int = 128,
    programs: int = 1024,
    num_warps: int = 4,
    num_stages: int = 1,
) -> LaunchConfig:
    """Launch choices for the sum of ``rows`` rows of ``D`` numbers.

    A thread has four 128-bit loads of a half type in flight. About a thousand programs, several per
    multiprocessor of a large GPU, share the rows, with at least two blocks each. On an H200, 8192 x 1152 in
    bfloat16 took 19 us, measured before chunks were whole blocks.
    """
    block_d = min(widest, max(16, 1 << (D - 1).bit_length()))
    columns = -(-D // block_d)
    chunks = max(1, min(rows // (2 * block_p), programs // columns))
    return LaunchConfig(
        block_p=block_p, block_d=block_d, chunks=chunks, num_warps=num_warps, num_stages=num_stages
    )
