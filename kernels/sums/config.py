"""Launch choices as plain data: no autotuning in a user's first step.

Keyword arguments are what ``bench/tune.py`` varies; ``tuned.json`` holds what it found better than a default.
"""

from dataclasses import dataclass

ANY = 0
"""The shape class of every width: one choice serves all."""

CHUNKS = {"widest": 16, "block_p": 128}
"""Where chunks are added up: few rows, at most 128 of them on their way at once, shared by many
multiprocessors."""


@dataclass(frozen=True, kw_only=True)
class LaunchConfig:
    """``block_p`` rows by ``block_d`` columns at a time; ``chunks``: programs that share a column, each with
    its own partial sum; ``num_stages``: blocks on their way at a time."""

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
    """For the sum of ``rows`` rows of ``D`` numbers.

    A thread has four 128-bit loads of a half type in flight; about a thousand programs, several for each
    multiprocessor of a large GPU, share the rows, at least two blocks each. On an H200 19 us for
    8192 x 1152 in bfloat16, before chunks were whole blocks.
    """
    block_d = min(widest, max(16, 1 << (D - 1).bit_length()))
    columns = -(-D // block_d)
    chunks = max(1, min(rows // (2 * block_p), programs // columns))
    return LaunchConfig(
        block_p=block_p, block_d=block_d, chunks=chunks, num_warps=num_warps, num_stages=num_stages
    )
