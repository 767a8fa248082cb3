"""Launch choices as plain data: no autotuning in a user's first step."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class LaunchConfig:
    """``block_r`` rows by ``block_f`` columns at a time; ``parts``: programs that share a column in the
    backward pass, each with its own partial sum of dbias."""

    block_r: int
    block_f: int
    parts: int
    num_warps: int


def launch_config(rows: int, features: int) -> LaunchConfig:
    """For ``rows`` x ``features`` numbers.

    32 numbers a thread are enough 128-bit accesses in flight; the backward pass is given about a thousand
    programs, several for each multiprocessor of a large GPU. Not yet tuned on a GPU.
    """
    block_f = min(256, max(16, 1 << (features - 1).bit_length()))
    block_r = 16
    columns = -(-features // block_f)
    parts = max(1, min(-(-rows // block_r), -(-1024 // columns)))
    return LaunchConfig(block_r=block_r, block_f=block_f, parts=parts, num_warps=4)
