"""Kernels at the widths of the published models (S, B, L, XL), to compile without a GPU."""

from collections.abc import Iterator
from itertools import product
from typing import Any

from ..aot import Case
from ..float8.aot import WITHOUT
from ..launches import columns, shape_class, tuned_for
from .config import launch_config, thin_config
from .kernel import (
    gate_residual_bwd_kernel,
    gate_residual_fwd_kernel,
    ln_modulate_bwd_kernel,
    ln_modulate_fwd_kernel,
)

WIDTHS = (384, 768, 1024, 1152)
FLOAT32 = ("out_scale_ptr", "mean_ptr", "rstd_ptr", "dgate_ptr", "dshift_ptr", "dscale_ptr")


def cases(arch: str) -> Iterator[Case]:
    """Forward and backward, with and without the gated residual, for uniform and ragged batches.

    bfloat16 at every width, float32 at the widest. The forward pass of ragged bfloat16 also with its output
    in float8. The backward pass recomputes the output.
    """
    types = [*product(WIDTHS, ("bf16",)), (max(WIDTHS), "fp32")]
    for (D, dtype), ragged in product(types, (False, True)):
        for gated in (False, True):
            form = {"GATED": gated, "OFFSETS": ragged}
            what = "gated" if gated else "plain"
            yield _case(arch, ln_modulate_fwd_kernel, D, dtype, what, form | {"FLOAT8": False})
            if ragged and dtype == "bf16" and arch not in WITHOUT:
                yield _case(arch, ln_modulate_fwd_kernel, D, dtype, what, form | {"FLOAT8": True})
            form |= {"RESIDUAL": True, "RECOMPUTE": True}
            yield _case(arch, ln_modulate_bwd_kernel, D, dtype, what, form)
        for kernel in (gate_residual_fwd_kernel, gate_residual_bwd_kernel):
            yield _case(arch, kernel, D, dtype, "residual", {"OFFSETS": ragged})


def _case(arch: str, kernel: Any, D: int, dtype: str, what: str, form: dict[str, bool]) -> Case:
    thin = what == "residual" or (what == "gated" and kernel is ln_modulate_bwd_kernel)
    name = ("gate_residual_" if what == "gated" else "") + kernel.__name__.removesuffix("_kernel")
    entry = name, shape_class(columns(D), dtype == "bf16")
    config = (thin_config if thin else launch_config)(D, 32, 256, **tuned_for(entry, arch))
    constants = form | {"BLOCK_D": config.block_d, "STAGES": config.num_stages}
    dtypes = {name: _dtype(name, dtype) for name in kernel.arg_names if name not in constants}
    in_float8 = form.get("FLOAT8", False)
    if in_float8:
        dtypes["out_ptr"] = "*fp8e4nv"
    return Case(
        kernel=kernel,
        label=f"D={D} {what} {'ragged' if form['OFFSETS'] else 'uniform'} {dtype}{' float8' * in_float8}",
        dtypes=dtypes,
        constants=constants,
        aligned=frozenset(name for name in dtypes if name != "eps"),
        num_warps=config.num_warps,
        entry=entry,
    )


def _dtype(name: str, dtype: str) -> str:
    if name == "eps":
        return "fp32"
    if name == "offsets_ptr":
        return "*i32"
    if name in FLOAT32:
        return "*fp32"
    return f"*{dtype}" if name.endswith("_ptr") else "i32"
