"""Kernels at the widths of the published models (S, B, L, XL), to compile without a GPU."""

from collections.abc import Iterator
from typing import Any

from ..aot import Case
from ..launches import columns, shape_class, tuned_for
from .config import rows_config, weight_config
from .kernel import quantize_rows_kernel, quantize_weight_kernel, weight_scales_kernel

WIDTHS = (384, 768, 1024, 1152)
"""The values of D; the other widths are 3 D and 4 D."""
WITHOUT = ("sm_80", "gfx942")
"""The A100 has no float8, and the MI300 has a different E4M3 format."""


def cases(arch: str) -> Iterator[Case]:
    """Activations and gradients in bfloat16, and float32 at the widest; GELU's bias is float32, as under
    autocast. Weights in both dtypes, with their transpose (training) and without (sampling)."""
    if arch in WITHOUT:
        return
    for D in WIDTHS:
        for width, form in ((D, ""), (3 * D, "gradient"), (4 * D, "gelu")):
            yield _rows(arch, width, form, "bf16")
    yield _rows(arch, 4 * max(WIDTHS), "", "fp32")
    for width in (max(WIDTHS), 4 * max(WIDTHS)):
        for dtype in ("bf16", "fp32"):
            yield from _weights(arch, width, dtype)


def _rows(arch: str, width: int, form: str, dtype: str) -> Case:
    entry = "quantize_rows", shape_class(columns(width), dtype == "bf16")
    config = rows_config(64 * 205, width, **tuned_for(entry, arch))
    pointers = {"x_ptr": f"*{dtype}", "bias_ptr": "*fp32", "factor_ptr": "*fp32", "out_ptr": "*fp8e4nv"}
    pointers |= {"scale_ptr": "*fp32", "sums_ptr": "*fp32"}
    return Case(
        kernel=quantize_rows_kernel,
        label=f"D={width} {form} {dtype}".replace("  ", " "),
        dtypes={**pointers, "R": "i32", "D": "i32"},
        constants={
            "GELU": form == "gelu", "FACTOR": form == "gradient", "SUMS": form == "gradient",
            "BLOCK_D": config.block_d, "STAGES": config.num_stages,
        },
        aligned=frozenset({*pointers, "D"}),
        num_warps=config.num_warps,
        entry=entry,
    )  # fmt: skip


def _weights(arch: str, width: int, dtype: str) -> Iterator[Case]:
    entry = "quantize_weight", shape_class(columns(width), dtype == "bf16")
    config = weight_config(width, **tuned_for(entry, arch))
    read = {"weight_ptr": f"*{dtype}", "scale_ptr": "*fp32"}
    pointers = {**read, "rows_ptr": "*fp8e4nv", "columns_ptr": "*fp8e4nv", "ones_ptr": "*fp32"}
    yield Case(
        kernel=weight_scales_kernel,
        label=f"D={width} {dtype}",
        dtypes={**read, "D": "i32"},
        constants={"BLOCK_D": config.row_block},
        aligned=frozenset({*read, "D"}),
        num_warps=config.row_warps,
        entry=entry,
    )
    for with_columns in (True, False):
        tile: dict[str, Any] = {"BLOCK_O": config.block_o, "BLOCK_D": config.block_d}
        yield Case(
            kernel=quantize_weight_kernel,
            label=f"D={width} {dtype}{' columns' * with_columns}",
            dtypes={**pointers, "outputs": "i32", "D": "i32"},
            constants={"COLUMNS": with_columns, **tile},
            aligned=frozenset({*pointers, "outputs", "D"}),
            num_warps=config.num_warps,
            entry=entry,
        )
