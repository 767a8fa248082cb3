"""Launch choices as plain data, so that a user's first step does no autotuning.

``bench/tune.py`` varies the keyword arguments; ``tuned.json`` holds the choices it found better than the
defaults.
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class LaunchConfig:
    """Tiles of ``block_r`` rows by ``block_f`` columns.

    In the backward pass, ``parts`` programs share a column, each with its own partial sum of dbias, and
    ``num_stages`` tiles are in flight at a time.
    """

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
    """Launch choices for ``rows`` x ``features`` numbers.

    With 32 numbers per thread, enough 128-bit accesses are in flight. The backward pass has about a thousand
    programs, several per multiprocessor of a large GPU. The defaults were chosen by compiling;
    ``kernels/tuned.json`` holds the choices measured on sm_90.
    """
    block_f = min(widest, max(16, 1 << (features - 1).bit_length()))
    columns = -(-features // block_f)
    parts = max(1, min(-(-rows // block_r), -(-programs // columns)))
    return LaunchConfig(
        block_r=block_r, block_f=block_f, parts=parts, num_warps=num_warps, num_stages=num_stages
    )
