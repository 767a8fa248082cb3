"""Kernels at the MLP widths of the published models (S, B, L, XL), to compile without a GPU."""

from collections.abc import Iterator
from itertools import product
from typing import Any

from ..aot import Case
from ..launches import columns, shape_class, tuned_for
from .config import launch_config
from .kernel import bias_gelu_bwd_kernel, bias_gelu_fwd_kernel

FEATURES = (1536, 3072, 4096, 4608)


def cases(arch: str) -> Iterator[Case]:
    """Forward and backward; bfloat16 at every width, float32 at the widest."""
    types = [*product(FEATURES, ("bf16",)), (max(FEATURES), "fp32")]
    for kernel, (features, dtype) in product((bias_gelu_fwd_kernel, bias_gelu_bwd_kernel), types):
        entry = kernel.__name__.removesuffix("_kernel"), shape_class(columns(features), dtype == "bf16")
        config = launch_config(32 * 256, features, **tuned_for(entry, arch))
        constants: dict[str, Any] = {"BLOCK_R": config.block_r, "BLOCK_F": config.block_f}
        if kernel is bias_gelu_bwd_kernel:
            constants |= {"RECOMPUTE": True, "STAGES": config.num_stages}
        dtypes = {name: _dtype(name, dtype) for name in kernel.arg_names if name not in constants}
        yield Case(
            kernel=kernel,
            label=f"F={features} {dtype}",
            dtypes=dtypes,
            constants=constants,
            aligned=frozenset(dtypes),
            num_warps=config.num_warps,
            entry=entry,
        )


def _dtype(name: str, dtype: str) -> str:
    if name == "dbias_ptr":
        return "*fp32"
    return f"*{dtype}" if name.endswith("_ptr") else "i32"
