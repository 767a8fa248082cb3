"""Plain PyTorch, any device and dtype. R rows, D columns, O outputs."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import checks

FLOAT8 = torch.float8_e4m3fn
LARGEST = 448.0
SMALLEST = -126
"""``LARGEST``: the largest float8 number. ``SMALLEST``: the smallest exponent of a scale."""


def quantize_rows(x_RD: Tensor, bias_D: Tensor | None, factor_D: Tensor | None) -> tuple[Tensor, Tensor]:
    x_RD = x_RD.float()
    if bias_D is not None:
        x_RD = F.gelu(x_RD + bias_D.to(x_RD.dtype), approximate="tanh")
    if factor_D is not None:
        x_RD = x_RD * factor_D.to(x_RD.dtype)
    scale_R = _scale(x_RD.abs().amax(1)) if x_RD.shape[1] else x_RD.new_ones(len(x_RD))
    return (x_RD / scale_R[:, None]).to(FLOAT8), scale_R


def quantize_weight(weight_OD: Tensor, columns: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows_OD, scale_O = quantize_rows(weight_OD, None, None)
    transposed = rows_OD.t().contiguous() if columns else rows_OD.new_empty(0)
    return rows_OD, transposed, scale_O, scale_O.new_ones(weight_OD.shape[1] if columns else 0)


def multiply(
    x_RD: Tensor, scale_R: Tensor, weight_OD: Tensor, scale_O: Tensor, bias_O: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """The product of the dequantized numbers. bfloat16 holds float8's numbers exactly; float16 could
    overflow, so float32 replaces it."""
    exact = torch.float32 if dtype == torch.float16 else dtype
    x_RD, weight_OD = (x.to(exact) for x in (x_RD, weight_OD))
    x_RD = x_RD * scale_R[:, None].to(exact)
    weight_OD = weight_OD * scale_O[:, None].to(exact)
    bias_O = None if bias_O is None else bias_O.to(exact)
    if not checks.autocasts(x_RD):
        return F.linear(x_RD, weight_OD, bias_O).to(dtype)
    with torch.autocast(x_RD.device.type, enabled=False):  # a backward pass may run under autocast
        return F.linear(x_RD, weight_OD, bias_O).to(dtype)


def _scale(most_R: Tensor) -> Tensor:
    """The smallest power of two that brings a row's largest number into float8's range; NaN if that number is
    not finite."""
    mantissa, exponent = torch.frexp(most_R)
    exponent = exponent - 9 + (mantissa > LARGEST / 512).to(exponent.dtype)
    exponent = torch.where(most_R == 0, SMALLEST, exponent)
    scale = ((exponent.clamp(min=SMALLEST).int() + 127) << 23).view(torch.float32)  # from its bits, exactly
    return torch.where(most_R.isfinite(), scale, torch.nan)
