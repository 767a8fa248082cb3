"""Launch choices as plain data, so that a user's first step does no autotuning.

``bench/tune.py`` varies the keyword arguments; ``tuned.json`` holds the choices it found better than the
defaults.
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class LaunchConfig:
    """A program handles ``block`` numbers of a sample."""

    block: int
    num_warps: int


def launch_config(numbers: int, *, widest: int = 1024, each: int = 8) -> LaunchConfig:
    """Launch choices for samples of ``numbers`` numbers, with ``each`` numbers per thread.

    8 numbers are one 16-byte access in half types and two in float32. The defaults are not measured on a GPU.
    """
    block = min(widest, max(32, 1 << (numbers - 1).bit_length()))
    return LaunchConfig(block=block, num_warps=max(1, block // (32 * each)))
