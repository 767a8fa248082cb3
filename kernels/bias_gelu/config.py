"""Launch choices as plain data: no autotuning in a user's first step.

Keyword arguments are what ``bench/tune.py`` varies; ``tuned.json`` holds what it found better than a default.
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class LaunchConfig:
    """``block_r`` rows by ``block_f`` columns at a time; ``parts``: programs that share a column in the
    backward pass, each with its own partial sum of dbias; ``num_stages``: blocks on their way at a time in
    it."""

    block_r: int
    block_f: int
    parts: int
    num_warps: int
    num_stages: int


def launch_config(
    rows: int,
    features: int,
    *,
    block_r: int = 16,
    widest: int = 256,
    programs: int = 1024,
    num_warps: int = 4,
    num_stages: int = 1,
) -> LaunchConfig:
    """For ``rows`` x ``features`` numbers.

    32 numbers a thread are enough 128-bit accesses in flight; the backward pass is given about a thousand
    programs, several for each multiprocessor of a large GPU. The defaults are not measured on a GPU.
    """
    block_f = min(widest, max(16, 1 << (features - 1).bit_length()))
    columns = -(-features // block_f)
    parts = max(1, min(-(-rows // block_r), -(-programs // columns)))
    return LaunchConfig(
        block_r=block_r, block_f=block_f, parts=parts, num_warps=num_warps, num_stages=num_stages
    )
