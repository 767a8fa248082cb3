"""Kernels at the widths and patch sizes of the published models, to compile without a GPU."""

from collections.abc import Iterator
from itertools import product

from ..aot import Case
from ..launches import columns, shape_class, tuned_for
from .config import launch_config
from .kernel import patch_embed_bwd_kernel, patch_embed_fwd_kernel

WIDTHS, CHANNELS = (384, 768, 1024, 1152), 4


def cases(arch: str) -> Iterator[Case]:
    """Forward and backward, all tokens and selected ones; bfloat16 at patch 2 and 8, float32 at patch 2."""
    types = [("bf16", 2), ("bf16", 8), ("fp32", 2)]
    for kernel, D, (dtype, p), ids in product(
        (patch_embed_fwd_kernel, patch_embed_bwd_kernel), (min(WIDTHS), max(WIDTHS)), types, (False, True)
    ):
        name, numbers = kernel.__name__.removesuffix("_kernel"), CHANNELS * p * p
        entry = name, shape_class(columns(numbers), dtype == "bf16")
        config = launch_config(numbers, 32, 256, D, **tuned_for(entry, arch))
        constants = {
            "p": p, "IDS": ids,
            "BLOCK_R": config.block_r, "BLOCK_J": config.block_j, "BLOCK_D": config.block_d,
        }  # fmt: skip
        dtypes = {name: _dtype(name, dtype) for name in kernel.arg_names if name not in constants}
        yield Case(
            kernel=kernel,
            label=f"D={D} p={p} {'chosen' if ids else 'all'} {dtype}",
            dtypes=dtypes,
            constants=constants,
            aligned=frozenset(name for name in dtypes if name.endswith("_ptr") or name in ("D", "L", "G")),
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            entry=entry,
        )


def _dtype(name: str, dtype: str) -> str:
    if name == "ids_ptr":
        return "*i64"
    if name in ("dweight_ptr", "dbias_ptr", "dpos_ptr"):
        return "*fp32"
    return f"*{dtype}" if name.endswith("_ptr") else "i32"
