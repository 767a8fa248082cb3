"""The kernels as registered ops. R rows, D columns, O outputs."""

from functools import cache

import torch
from torch import Tensor

from .. import checks
from ..backends import launching, on_triton
from ..registry import registered
from ..sums import sum_rows
from . import reference
from .reference import FLOAT8

CAPABILITIES = ((8, 9), (9, 0), (10, 0), (10, 3))
"""Ada, Hopper and data-centre Blackwell, for which PyTorch has products with one scale per row."""
MULTIPLE = 16
"""The widths of the operands must be multiples of it."""
MAX_D = 2**16
"""Widest row; a program holds a row in registers."""


@registered("mdt_fast::quantize_rows")
def quantize_rows_fwd(
    x_RD: Tensor, bias_D: Tensor | None, factor_D: Tensor | None, sums: torch.dtype | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The rows in float8 [R, D], their scales [R] in float32, and the sum of the rows of ``x`` [D] in the
    dtype ``sums`` (empty if that is None)."""
    if not rounds(x_RD):
        rows = reference.quantize_rows(x_RD, bias_D, factor_D)
        return *rows, x_RD.new_empty(0) if sums is None else sum_rows(x_RD, sums)
    if x_RD.shape[1] > MAX_D:
        raise ValueError(f"x: width {x_RD.shape[1]}, the Triton kernel takes at most {MAX_D}")
    outputs = out_RD, scale_R, sums_D = _with_sums(x_RD, sums)
    if not out_RD.numel():
        scale_R.fill_(1)
        sums_D.zero_()
    else:
        to = None if sums is None else sums_D
        launching(__package__).quantize_rows(x_RD, bias_D, factor_D, out_RD, scale_R, to)
    return outputs


@registered("mdt_fast::quantize_weight")
def quantize_weight_fwd(weight_OD: Tensor, columns: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The rows in float8 [O, D], their transpose [D, O] (empty unless ``columns``), the scales of the rows
    [O] in float32, and ones [D] as the scales of the transpose."""
    if not rounds(weight_OD):
        return reference.quantize_weight(weight_OD, columns)
    outputs = rows_OD, columns_DO, scale_O, ones_D = _weight(weight_OD, columns)
    if not rows_OD.numel():
        scale_O.fill_(1)
        ones_D.fill_(1)
    else:
        transposed = columns_DO if columns else None
        launching(__package__).quantize_weight(weight_OD, rows_OD, transposed, scale_O, ones_D)
    return outputs


@registered("mdt_fast::multiply_float8")
def multiply(
    x_RD: Tensor,
    scale_R: Tensor,
    weight_OD: Tensor,
    scale_O: Tensor,
    bias_O: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """``x @ weight.T + bias`` [R, O] in ``dtype``, for float8 operands with the scales of their rows.

    The sums are float32. A GPU rounds them to bfloat16 first, whatever ``dtype`` is.
    """
    if not multiplies(x_RD.device):
        return reference.multiply(x_RD, scale_R, weight_OD, scale_O, bias_O, dtype)
    if not len(x_RD):
        return scale_R.new_empty(0, len(weight_OD), dtype=dtype)
    bias_O = None if bias_O is None else checks.cast(bias_O, torch.bfloat16)
    out_RO = torch._scaled_mm(
        x_RD, weight_OD.t(), scale_R[:, None], scale_O[None], bias_O, out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )  # fmt: skip
    return checks.cast(out_RO, dtype)


def rounds(x: Tensor) -> bool:
    """Whether a Triton kernel that writes float8 can run on ``x``; GPUs without float8 products cannot."""
    return on_triton(x) and (not x.is_cuda or multiplies(x.device))


@cache
def multiplies(device: torch.device) -> bool:
    """Whether ``device`` is a GPU with products of float8 (E4M3)."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) in CAPABILITIES


@quantize_rows_fwd.register_fake
def _(x_RD, bias_D, factor_D, sums):  # type: ignore[no-untyped-def]
    return _with_sums(x_RD, sums)


@quantize_weight_fwd.register_fake
def _(weight_OD, columns):  # type: ignore[no-untyped-def]
    return _weight(weight_OD, columns)


@multiply.register_fake
def _(x_RD, scale_R, weight_OD, scale_O, bias_O, dtype):  # type: ignore[no-untyped-def]
    return scale_R.new_empty(x_RD.shape[0], weight_OD.shape[0], dtype=dtype)


def _rows(x_RD: Tensor) -> tuple[Tensor, Tensor]:
    R, D = x_RD.shape
    return x_RD.new_empty(R, D, dtype=FLOAT8), x_RD.new_empty(R, dtype=torch.float32)


def _with_sums(x_RD: Tensor, sums: torch.dtype | None) -> tuple[Tensor, Tensor, Tensor]:
    sums_D = x_RD.new_empty(0) if sums is None else x_RD.new_empty(x_RD.shape[1], dtype=sums)
    return *_rows(x_RD), sums_D


def _weight(weight_OD: Tensor, columns: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    outputs, D = weight_OD.shape
    rows_OD, scale_O = _rows(weight_OD)
    columns_DO = rows_OD.new_empty((D, outputs) if columns else 0)
    return rows_OD, columns_DO, scale_O, scale_O.new_empty(D if columns else 0)
