"""Launch choices as plain data: no autotuning in a user's first step."""

from dataclasses import dataclass, replace

MAX_D = 8192
"""Widest row a program holds in registers."""


@dataclass(frozen=True, kw_only=True)
class LaunchConfig:
    """``block_d``: columns a program holds; ``programs``: per sample; ``num_warps`` of each program."""

    block_d: int
    programs: int
    num_warps: int


def launch_config(D: int, batch: int, tokens: int) -> LaunchConfig:
    """For rows of width ``D``, ``batch`` samples of about ``tokens`` tokens.

    16 numbers a thread keep a row and its modulation in registers; enough programs to give each of a large
    GPU's 132 to 148 multiprocessors several, and at least four rows to each program. Not yet tuned on a GPU.
    """
    block_d = max(32, 1 << (D - 1).bit_length())
    num_warps = min(16, max(1, block_d // 512))
    programs = max(1, min(-(-tokens // 4), -(-2048 // max(batch, 1))))
    return LaunchConfig(block_d=block_d, programs=programs, num_warps=num_warps)


def thin_config(D: int, batch: int, tokens: int) -> LaunchConfig:
    """With half as many numbers a thread: one 128-bit load of a half type.

    For the gated residual alone, which forms no statistics (with more, the compiler for sm_100 spills), and
    for the gated backward pass, which holds three sums and a gate besides the row (with more it takes 168
    registers, and of ragged samples it spills on sm_80 and sm_90).
    """
    config = launch_config(D, batch, tokens)
    return replace(config, num_warps=min(16, 2 * config.num_warps))
