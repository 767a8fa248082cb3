"""Argument checks and dispatch, and the matrix products. R rows, D columns, O outputs."""

import torch
from torch import Tensor

from .. import checks
from . import reference
from .registered import multiply, quantize_rows_fwd, quantize_weight_fwd


def quantize_rows(
    x: Tensor, *, gelu_bias: Tensor | None = None, factor: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Quantize ``x`` [R, D] row by row to float8 (E4M3); returns the rows [R, D] and their scales [R].

    The scales are float32 powers of two, and ``x`` is approximately ``rows * scales[:, None]``: each number
    is within 1/16 of itself, or within 2^-10 of its row's scale. A row with a number that is not finite gets
    the scale NaN.

    With ``gelu_bias`` [D], ``gelu(x + gelu_bias)`` (tanh form) is quantized instead; with ``factor`` [D],
    ``x * factor``. The arithmetic is float32 for every floating dtype of ``x``, and there is no derivative.
    Raises ``ValueError`` for shapes or dtypes that do not fit.
    """
    checks.floating("x", x)
    checks.shape("x", x, "R", "D")
    for name, vector in (("gelu_bias", gelu_bias), ("factor", factor)):
        if vector is not None:
            checks.shape(name, vector, x.shape[1])
            checks.floating_on(name, vector, x)
    with torch.no_grad():
        if checks.plain_only():
            return reference.quantize_rows(x, gelu_bias, factor)
        return quantize_rows_fwd(x.contiguous(), _together(gelu_bias), _together(factor), None)[:2]


def quantize_weight(weight: Tensor, *, columns: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize the rows of ``weight`` [O, D] as :func:`quantize_rows` does.

    Returns the rows [O, D], the same numbers transposed [D, O] (empty unless ``columns``), which the product
    for the input gradient reads, and the scales [O]. Raises ``ValueError`` if ``weight`` is not a floating
    matrix.
    """
    checks.floating("weight", weight)
    checks.shape("weight", weight, "O", "D")
    with torch.no_grad():
        if checks.plain_only():
            return reference.quantize_weight(weight, columns)[:3]
        return quantize_weight_fwd(weight.contiguous(), columns)[:3]


def product(
    x_RD: Tensor, weight_OD: Tensor, scale_O: Tensor, bias_O: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """``x @ weight.T + bias`` in ``dtype``: [R, O]; ``weight`` is from :func:`quantize_weight`."""
    rows_RD, scale_R, _ = quantize_rows_fwd(x_RD.contiguous(), None, None, None)
    return multiply(rows_RD, scale_R, weight_OD, scale_O, bias_O, dtype)


def product_of_gelu(
    x_RD: Tensor, gelu_bias_D: Tensor, weight_OD: Tensor, scale_O: Tensor, bias_O: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """:func:`product` of ``gelu(x + gelu_bias)``; the activation is written only as float8."""
    rows_RD, scale_R, _ = quantize_rows_fwd(x_RD.contiguous(), gelu_bias_D.contiguous(), None, None)
    return multiply(rows_RD, scale_R, weight_OD, scale_O, bias_O, dtype)


def input_gradient(
    dout_RO: Tensor, columns_DO: Tensor, scale_O: Tensor, ones_D: Tensor, sums: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    """``dout @ weight`` [R, D], and the sum of the rows of ``dout`` [O] in the dtype ``sums``.

    The product reads the quantized weight of the forward pass. The scales of the weight's rows lie along the
    reduction here, so they are multiplied into ``dout`` before it is quantized. The sum is taken in the same
    read of ``dout``.
    """
    rows_RO, scale_R, sums_O = quantize_rows_fwd(dout_RO.contiguous(), None, scale_O, sums)
    return multiply(rows_RO, scale_R, columns_DO, ones_D, None, dout_RO.dtype), sums_O


def _together(vector: Tensor | None) -> Tensor | None:
    return None if vector is None else vector.contiguous()
