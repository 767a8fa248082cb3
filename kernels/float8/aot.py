"""The kernels at the widths of the published models (S, B, L, XL), for compiling without a GPU."""

from collections.abc import Iterator
from typing import Any

from ..aot import Case
from ..launches import columns, shape_class, tuned_for
from .config import rows_config, weight_config
from .kernel import quantize_rows_kernel, quantize_weight_kernel

WIDTHS = (384, 768, 1024, 1152)
"""D; the others are 3 D and 4 D."""
WITHOUT = ("sm_80", "gfx942")
"""A100 has no float8; MI300's E4M3 is another."""


def cases(arch: str) -> Iterator[Case]:
    """Activations and gradients in bfloat16; weights in bfloat16 and float32."""
    if arch in WITHOUT:
        return
    for D in WIDTHS:
        for width, gelu, factor in ((D, False, False), (3 * D, False, True), (4 * D, True, False)):
            entry = "quantize_rows", shape_class(columns(width), True)
            config = rows_config(64 * 205, width, **tuned_for(entry, arch))
            constants: dict[str, Any] = {"GELU": gelu, "FACTOR": factor}
            constants |= {"BLOCK_D": config.block_d, "STAGES": config.num_stages}
            yield Case(
                kernel=quantize_rows_kernel,
                label=f"D={width}{' gelu' * gelu}{' factor' * factor} bf16",
                dtypes={
                    "x_ptr": "*bf16", "bias_ptr": "*bf16", "factor_ptr": "*fp32", "out_ptr": "*fp8e4nv",
                    "scale_ptr": "*fp32", "R": "i32", "D": "i32",
                },
                constants=constants,
                aligned=frozenset({"x_ptr", "bias_ptr", "factor_ptr", "out_ptr", "scale_ptr", "D"}),
                num_warps=config.num_warps,
                entry=entry,
            )  # fmt: skip
    for width in (1152, 4608):
        for dtype in ("bf16", "fp32"):
            entry = "quantize_weight", shape_class(columns(width), dtype == "bf16")
            weight = weight_config(4608, width, **tuned_for(entry, arch))
            pointers = {"weight_ptr": f"*{dtype}", "rows_ptr": "*fp8e4nv", "columns_ptr": "*fp8e4nv"}
            yield Case(
                kernel=quantize_weight_kernel,
                label=f"D={width} {dtype}",
                dtypes={**pointers, "scale_ptr": "*fp32", "outputs": "i32", "D": "i32"},
                constants={"COLUMNS": True, "BLOCK_O": weight.block_o, "BLOCK_D": weight.block_d},
                aligned=frozenset({*pointers, "scale_ptr", "outputs", "D"}),
                num_warps=weight.num_warps,
                entry=entry,
            )
