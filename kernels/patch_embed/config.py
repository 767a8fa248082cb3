"""Launch choices as plain data: no autotuning in a user's first step."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class LaunchConfig:
    """``block_r`` tokens by ``block_d`` columns, ``block_j`` numbers of a patch at a time.

    ``parts``: programs that share the images of a block in the backward pass.
    """

    block_r: int
    block_d: int
    block_j: int
    parts: int
    num_warps: int
    num_stages: int


def launch_config(numbers: int, batch: int, blocks: int) -> LaunchConfig:
    """For patches of ``numbers`` numbers; ``blocks`` of tokens and columns are what the backward pass has.

    About five hundred programs there, each with four images or more. Not yet tuned on a GPU.
    """
    block_j = min(64, max(16, 1 << (numbers - 1).bit_length()))
    parts = max(1, min(batch // 4, -(-512 // max(1, blocks))))
    return LaunchConfig(block_r=64, block_d=64, block_j=block_j, parts=parts, num_warps=8, num_stages=2)
