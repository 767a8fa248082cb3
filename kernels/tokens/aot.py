"""Kernels at the widths of the published models (S, B, L, XL), to compile without a GPU."""

from collections.abc import Iterator
from itertools import product
from typing import Any

from ..aot import Case
from ..launches import Entry, columns, shape_class, tuned_for
from .config import launch_config, row_config
from .kernel import (
    gather_tokens_bwd_kernel,
    gather_tokens_fwd_kernel,
    merge_tokens_bwd_kernel,
    merge_tokens_fwd_kernel,
    unmask_tokens_bwd_kernel,
    unmask_tokens_fwd_kernel,
)

WIDTHS = (384, 768, 1024, 1152)


def cases(arch: str) -> Iterator[Case]:
    """Forward and backward; bfloat16 at every width, float32 at the widest."""
    for D, dtype in (*product(WIDTHS, ("bf16",)), (max(WIDTHS), "fp32")):
        shape = shape_class(columns(D), dtype == "bf16")
        for kernel in (unmask_tokens_fwd_kernel, unmask_tokens_bwd_kernel):
            entry = _name(kernel), shape
            config = launch_config(D, 32, 256, **tuned_for(entry, arch))
            constants = {"BLOCK_D": config.block_d}
            yield _case(kernel, f"D={D} {dtype}", dtype, constants, config.num_warps, entry)
        for kernel in (gather_tokens_fwd_kernel, merge_tokens_fwd_kernel, merge_tokens_bwd_kernel):
            entry = _name(kernel), shape
            rows = row_config(D, **tuned_for(entry, arch))
            yield _case(kernel, f"D={D} {dtype}", dtype, {"BLOCK_D": rows.block_d}, rows.num_warps, entry)
        entry = "gather_tokens_bwd", shape
        rows = row_config(D, **tuned_for(entry, arch))
        for restore in (False, True):
            constants = {"BLOCK_D": rows.block_d, "BLOCK_K": rows.block_k, "RESTORE": restore}
            label = f"D={D}{' restore' if restore else ''} {dtype}"
            yield _case(gather_tokens_bwd_kernel, label, dtype, constants, rows.num_warps, entry)


def _name(kernel: Any) -> str:
    return str(kernel.__name__).removesuffix("_kernel")


def _case(
    kernel: Any, label: str, dtype: str, constants: dict[str, Any], num_warps: int, entry: Entry
) -> Case:
    dtypes = {name: _dtype(name, dtype) for name in kernel.arg_names if name not in constants}
    return Case(
        kernel=kernel,
        label=label,
        dtypes=dtypes,
        constants=constants,
        aligned=frozenset(name for name in dtypes if name.endswith("_ptr") or name == "D"),
        num_warps=num_warps,
        entry=entry,
    )


def _dtype(name: str, dtype: str) -> str:
    if name in ("restore_ptr", "ids_ptr"):
        return "*i64"
    if name in ("dmask_ptr", "dpos_ptr"):
        return "*fp32"
    return f"*{dtype}" if name.endswith("_ptr") else "i32"
