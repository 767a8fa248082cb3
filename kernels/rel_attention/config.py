"""Launch choices as plain data, so that a user's first step does no autotuning.

The defaults were chosen by compiling for each architecture (no spills at the published head sizes);
``kernels/tuned.json`` holds the choices measured on sm_90.
"""

from dataclasses import dataclass, replace
from functools import cache
from typing import Literal, get_args

from ..launches import Entry, shape_class, tuned_for

BiasForm = Literal["lookup", "dense"]
"""``lookup``: every score reads the table. ``dense``: each call writes one float32 bias [H, G*G, G*G], which
the batch shares."""
TableGrad = Literal["recompute", "store"]
"""``recompute``: compute the scores once more and sum dS over samples in registers. ``store``: the kernel for
the gradients of k and v stores dS for some samples at a time, and another kernel gathers it. In half types
and up to ``GATHERED`` grid positions, that kernel also computes the gradient of q from dS, without scores of
its own. The table's sums are of dS as stored, which half types round."""
BIAS_FORMS, TABLE_GRADS = get_args(BiasForm), get_args(TableGrad)
Kind = Literal["half", "float32", "tf32"]
"""The operands of the products: float16 or bfloat16; float32; float32 on TF32 tensor cores."""

MAX_HEAD_DIM = 128
EIGHT = 8
"""Two-byte numbers in the widest memory access."""
MAX_GRID = 64
"""64 x 64 tokens: 1024-pixel images at patch 2 on latents, or 512-pixel images at patch 8."""

DS_BYTES = 128 * 2**20
"""Most memory for dS at a time with ``store``, unless a single sample needs more."""
GATHERED = 256
"""Most grid positions whose dS a program reads at once."""
DBIAS_BYTES = 256 * 2**20
"""Most memory for the sums over samples at a time with ``recompute``."""


@dataclass(frozen=True, kw_only=True)
class LaunchConfig:
    """A program's tile of ``block_m`` queries by ``block_n`` keys, its warps and its pipeline stages."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True, kw_only=True)
class LaunchConfigs:
    """One choice per kernel: forward; gradient of q; gradients of k and v; gradient of the table with
    ``recompute``; gradients of the table and q with ``store``."""

    forward: LaunchConfig
    q: LaunchConfig
    kv: LaunchConfig
    bias: LaunchConfig
    gather: LaunchConfig


def _launch(block_m: int, block_n: int, num_warps: int, num_stages: int) -> LaunchConfig:
    return LaunchConfig(block_m=block_m, block_n=block_n, num_warps=num_warps, num_stages=num_stages)


_SUMMING = _launch(32, 64, 4, 2)
"""For a gather that only sums the stored dS."""


def _launches(*each: tuple[int, int, int, int]) -> LaunchConfigs:
    """(``block_m``, ``block_n``, ``num_warps``, ``num_stages``) of each of: forward, q, kv, bias."""
    forward, q, kv, bias = (_launch(*one) for one in each)
    return LaunchConfigs(forward=forward, q=q, kv=kv, bias=bias, gather=_SUMMING)


_HALF = {
    ("sm_80", 64): _launches((64, 64, 4, 3), (64, 64, 8, 3), (32, 64, 4, 3), (64, 32, 4, 3)),
    ("sm_80", 80): _launches((64, 64, 4, 3), (64, 32, 4, 3), (32, 64, 4, 3), (64, 32, 4, 2)),
    ("sm_80", 128): _launches((64, 32, 4, 2), (32, 32, 4, 2), (32, 32, 4, 2), (32, 32, 4, 2)),
    ("sm_90", 64): _launches((64, 64, 4, 3), (64, 64, 4, 3), (64, 64, 8, 3), (64, 64, 8, 2)),
    ("sm_90", 80): _launches((64, 64, 4, 3), (64, 64, 4, 3), (64, 64, 8, 3), (64, 64, 8, 2)),
    ("sm_90", 128): _launches((64, 32, 4, 2), (64, 32, 8, 2), (32, 64, 8, 2), (64, 32, 8, 2)),
    ("sm_100", 64): _launches((64, 64, 4, 3), (64, 64, 8, 3), (32, 64, 4, 3), (64, 64, 8, 2)),
    ("sm_100", 80): _launches((64, 32, 4, 2), (64, 64, 8, 3), (32, 64, 4, 2), (64, 64, 8, 2)),
    ("sm_100", 128): _launches((64, 32, 4, 2), (64, 32, 8, 2), (32, 64, 8, 2), (64, 32, 8, 2)),
    ("gfx942", 64): _launches(*[(64, 64, 4, 1)] * 4),
    ("gfx942", 80): _launches(*[(64, 64, 4, 1)] * 4),
    ("gfx942", 128): _launches((64, 32, 4, 1), (64, 32, 4, 1), (32, 32, 4, 1), (32, 32, 4, 1)),
}
"""By architecture and the largest head size that the entry serves (80 is held as 64 + 16 columns)."""
_FLOAT32 = {
    ("sm_80", 64): _launches((32, 32, 4, 1), (32, 32, 8, 1), (32, 32, 8, 1), (32, 32, 4, 2)),
    ("sm_80", 80): _launches((32, 32, 8, 1), (32, 32, 8, 2), (32, 16, 4, 2), (32, 32, 4, 2)),
    ("sm_80", 128): _launches((32, 32, 8, 1), (16, 16, 8, 2), (16, 16, 8, 1), (16, 16, 4, 2)),
    ("sm_90", 64): _launches((32, 32, 8, 1), (32, 32, 8, 1), (32, 32, 8, 2), (32, 32, 8, 2)),
    ("sm_90", 80): _launches((32, 32, 8, 1), (32, 32, 8, 2), (32, 32, 4, 2), (32, 32, 4, 2)),
    ("sm_90", 128): _launches((32, 32, 8, 1), (16, 16, 4, 2), (16, 16, 4, 1), (16, 16, 4, 1)),
    ("sm_100", 64): _launches((32, 32, 8, 1), (32, 32, 8, 2), (32, 32, 8, 2), (32, 32, 4, 1)),
    ("sm_100", 80): _launches((32, 32, 8, 1), (32, 32, 8, 2), (32, 32, 4, 2), (32, 32, 4, 2)),
    ("sm_100", 128): _launches((32, 32, 8, 1), (16, 16, 4, 2), (16, 16, 4, 1), (16, 16, 4, 1)),
    ("gfx942", 64): _launches(*[(64, 32, 4, 1)] * 4),
    ("gfx942", 80): _launches(*[(64, 32, 4, 1)] * 4),
    ("gfx942", 128): _launches((32, 32, 4, 1), (32, 32, 4, 1), (32, 32, 4, 1), (32, 32, 4, 1)),
}
_TF32 = {
    ("sm_80", 64): _launches((32, 64, 8, 2), (32, 64, 8, 1), (32, 32, 4, 1), (32, 64, 8, 1)),
    ("sm_80", 80): _launches((64, 32, 8, 2), (32, 16, 8, 1), (16, 32, 4, 1), (32, 64, 8, 1)),
    ("sm_80", 128): _launches((32, 64, 8, 1), (32, 16, 8, 1), (32, 16, 8, 1), (32, 64, 8, 1)),
    ("sm_90", 64): _launches((64, 32, 4, 2), (64, 32, 8, 2), (64, 32, 8, 1), (64, 32, 8, 1)),
    ("sm_90", 80): _launches((64, 32, 4, 2), (64, 32, 8, 2), (16, 64, 8, 1), (64, 32, 4, 1)),
    ("sm_90", 128): _launches((64, 32, 8, 2), (64, 32, 8, 2), (32, 32, 8, 1), (64, 32, 8, 1)),
    ("sm_100", 64): _launches((64, 64, 4, 1), (64, 64, 8, 1), (32, 64, 8, 1), (64, 64, 8, 1)),
    ("sm_100", 80): _launches((64, 64, 4, 1), (64, 32, 8, 1), (32, 64, 8, 1), (64, 64, 8, 1)),
    ("sm_100", 128): _launches((64, 64, 8, 1), (64, 32, 8, 2), (32, 16, 8, 1), (64, 64, 8, 1)),
}
"""Only NVIDIA has these."""
_GATHER = {
    "sm_80": _launch(16, GATHERED, 8, 1),
    "sm_90": _launch(64, GATHERED, 16, 2),
    "sm_100": _launch(16, GATHERED, 8, 3),
    "gfx942": _launch(16, GATHERED, 8, 1),
    "interpreter": _launch(64, GATHERED, 1, 1),
}
"""For half types, where the gather also computes the gradient of q, so that a program reads all keys."""
_STORING = _launch(16, 32, 8, 2)
"""For gradients of k and v that store dS, in float32 and with heads up to 80."""
KERNELS = {
    "forward": "rel_attention_fwd",
    "q": "rel_attention_bwd_q",
    "kv": "rel_attention_bwd_kv",
    "bias": "rel_attention_bwd_bias",
    "gather": "rel_attention_bwd_gather",
}
"""The kernel of each field of :class:`LaunchConfigs`."""
_INTERPRETER = _launches(*[(64, 64, 1, 1)] * 4)
"""Large tiles, because the interpreter's time goes with the number of programs."""


def launch_configs(arch: str, head_dim: int, kind: Kind) -> LaunchConfigs:
    """Launch choices for a head size on ``sm_80``, ``sm_90``, ``sm_100``, ``gfx942`` or ``interpreter``."""
    found = _INTERPRETER
    if arch != "interpreter":
        found = {"half": _HALF, "float32": _FLOAT32, "tf32": _TF32}[kind][arch, _widest(head_dim)]
    if kind == "half":
        found = replace(found, gather=_GATHER[arch])
    measured = {
        field: replace(getattr(found, field), **choice)
        for field, kernel in KERNELS.items()
        if (choice := tuned_for(entry(kernel, head_dim, kind), arch))
    }
    return replace(found, **measured) if measured else found


def entry(kernel: str, head_dim: int, kind: Kind) -> Entry:
    """The entry of ``tuned.json`` for one of ``KERNELS`` at a head size."""
    return kernel, shape_class(_widest(head_dim), kind == "half", kind == "tf32")


def _widest(head_dim: int) -> int:
    return 64 if head_dim <= 64 else 80 if head_dim <= 80 else MAX_HEAD_DIM


@cache
def split_head(head_dim: int) -> tuple[int, int]:
    """The head size as two tile widths, each a power of two of at least 16; the second may be 0. Example: 72
    as 64 + 16."""
    first = max(16, 1 << (head_dim.bit_length() - 1))
    rest = max(0, head_dim - first)
    return first, max(16, 1 << (rest - 1).bit_length()) if rest else 0


def in_tf32(head_dim: int) -> bool:
    """Whether the kernels may use TF32 at this head size.

    Not where the tiles are 32 and 16 wide: there, with the ptxas of Triton 3.6 and 3.7, the gradient of q
    reads registers on Hopper that nothing writes (``unset_registers`` in ``kernels/aot.py``).
    """
    return split_head(head_dim) != (32, 16)


def bias_parts(batch: int, tiles: int) -> int:
    """The number of programs that share the samples of one tile of the table's gradient: about 500 in all,
    each with four samples or more."""
    return max(1, min(batch // 4, -(-512 // tiles)))


def gathers_queries(half: bool, grid_size: int) -> bool:
    """Whether ``store`` computes the gradient of q from the stored dS; programs then read dS of all keys."""
    return half and grid_size**2 <= GATHERED


def gather_blocks(configs: LaunchConfigs, queries: bool, grid_size: int) -> LaunchConfig:
    """The gather's tile of grid positions; it has all keys if the gradient of q is computed from it."""
    if not queries:
        return _SUMMING
    wide = max(16, 1 << (grid_size**2 - 1).bit_length())
    return replace(configs.gather, block_m=min(configs.gather.block_m, wide), block_n=wide)


def kv_blocks(configs: LaunchConfigs, store: bool, head_dim: int, half: bool) -> LaunchConfig:
    """Launch choice for the gradients of k and v, with or without storing dS."""
    return _STORING if store and not half and _widest(head_dim) < MAX_HEAD_DIM else configs.kv


def gather_parts(samples: int, tiles: int) -> int:
    """The number of programs that share the samples of one tile of stored dS: about 128 in all, as each
    occupies a multiprocessor, each with four samples or more."""
    return max(1, min(samples // 4, 128 // tiles))


def table_blocks(arch: str, grid_size: int) -> dict[str, int]:
    """The block of ``dbias`` that a program of the table's gradient reads at once: up to 8,192 numbers (AMD:
    4,096)."""
    numbers = 4096 if arch.startswith("gfx") else 8192
    wide, side = (1 << (size - 1).bit_length() for size in (2 * grid_size - 1, grid_size))
    return {"BLOCK_R": max(1, min(side, numbers // (wide * side))), "BLOCK_W": wide, "BLOCK_G": side}
