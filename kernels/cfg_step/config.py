"""Launch choices as plain data: no autotuning in a user's first step."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class LaunchConfig:
    """``block`` numbers of a sample that a program takes."""

    block: int
    num_warps: int


def launch_config(numbers: int) -> LaunchConfig:
    """For samples of ``numbers`` numbers. 8 numbers a thread: 16-byte accesses in half types, two in float32.

    Not yet tuned on a GPU.
    """
    block = min(1024, max(32, 1 << (numbers - 1).bit_length()))
    return LaunchConfig(block=block, num_warps=max(1, block // 256))
