"""Launch choices as plain data, so that a user's first step does no autotuning.

``bench/tune.py`` varies the keyword arguments; ``tuned.json`` holds the choices it found better than the
defaults.
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class LaunchConfig:
    """Tiles of ``block_r`` tokens by ``block_d`` columns, with ``block_j`` numbers of a patch at a time.

    In the backward pass, ``parts`` programs share the images of a tile.
    """

    block_r: int
    block_d: int
    block_j: int
    parts: int
    num_warps: int
    num_stages: int


def launch_config(
    numbers: int,
    batch: int,
    tokens: int,
    D: int,
    *,
    block_r: int = 64,
    block_d: int = 64,
    widest: int = 64,
    programs: int = 512,
    num_warps: int = 8,
    num_stages: int = 2,
) -> LaunchConfig:
    """Launch choices for patches of ``numbers`` numbers; ``batch`` images of ``tokens`` tokens, width ``D``.

    The backward pass has about ``programs`` programs, each with four images or more. The defaults are not
    measured on a GPU.
    """
    block_j = min(widest, max(16, 1 << (numbers - 1).bit_length()))
    blocks = -(-tokens // block_r) * -(-D // block_d)
    return LaunchConfig(
        block_r=block_r,
        block_d=block_d,
        block_j=block_j,
        parts=max(1, min(batch // 4, -(-programs // max(1, blocks)))),
        num_warps=num_warps,
        num_stages=num_stages,
    )
