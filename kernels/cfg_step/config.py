"""Launch choices as plain data: no autotuning in a user's first step.

Keyword arguments are what ``bench/tune.py`` varies; ``tuned.json`` holds what it found better than a default.
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class LaunchConfig:
    """``block`` numbers of a sample that a program takes."""

    block: int
    num_warps: int


def launch_config(numbers: int, *, widest: int = 1024, each: int = 8) -> LaunchConfig:
    """For samples of ``numbers`` numbers, ``each`` of them to a thread: 8 are 16-byte accesses in half types,
    two in float32. The defaults are not measured on a GPU.
    """
    block = min(widest, max(32, 1 << (numbers - 1).bit_length()))
    return LaunchConfig(block=block, num_warps=max(1, block // (32 * each)))
