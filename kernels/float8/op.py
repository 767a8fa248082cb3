"""Checks and dispatch, and the products. R rows, D columns, O outputs."""

import torch
from torch import Tensor

from .. import checks
from . import reference
from .registered import multiply, quantize_rows_fwd, quantize_weight_fwd


def quantize_rows(
    x: Tensor, *, gelu_bias: Tensor | None = None, factor: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Rows of ``x`` [R, D], floating, in float8 (E4M3) [R, D], and their scales [R], float32 powers of two:
    ``x`` is about ``rows * scales[:, None]``, each number within 1/16 of itself or 2^-10 of its row's scale.

    ``gelu_bias`` [D]: of ``gelu(x + gelu_bias)``, tanh form, instead; ``factor`` [D]: of ``x * factor``. A
    row with a number that is not finite has NaN for its scale. In float32, whatever ``x`` is; has no
    derivative. Raises ``ValueError`` for shapes or dtypes that do not fit.
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
    """The rows of ``weight`` [O, D] as by :func:`quantize_rows`: [O, D], the same numbers transposed [D, O]
    (empty unless ``columns``), which is what a product with the weight's columns reads, and the scales [O].
    Raises ``ValueError`` for what is no floating matrix."""
    checks.floating("weight", weight)
    checks.shape("weight", weight, "O", "D")
    with torch.no_grad():
        if checks.plain_only():
            return reference.quantize_weight(weight, columns)[:3]
        return quantize_weight_fwd(weight.contiguous(), columns)[:3]


def product(
    x_RD: Tensor, weight_OD: Tensor, scale_O: Tensor, bias_O: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """``x @ weight.T + bias`` in ``dtype``: [R, O]; ``weight`` as by :func:`quantize_weight`."""
    rows_RD, scale_R, _ = quantize_rows_fwd(x_RD.contiguous(), None, None, None)
    return multiply(rows_RD, scale_R, weight_OD, scale_O, bias_O, dtype)


def product_of_gelu(
    x_RD: Tensor, gelu_bias_D: Tensor, weight_OD: Tensor, scale_O: Tensor, bias_O: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """:func:`product` of ``gelu(x + gelu_bias)``, which is rounded to float8 alone."""
    rows_RD, scale_R, _ = quantize_rows_fwd(x_RD.contiguous(), gelu_bias_D.contiguous(), None, None)
    return multiply(rows_RD, scale_R, weight_OD, scale_O, bias_O, dtype)


def input_gradient(
    dout_RO: Tensor, columns_DO: Tensor, scale_O: Tensor, ones_D: Tensor, sums: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    """``dout @ weight``: [R, D], by the rounded weight of the forward pass; its rows' scales are columns'
    here, and go into ``dout`` before that is rounded. And the sum of its rows [O] in the dtype ``sums``,
    which costs no further reading of them."""
    rows_RO, scale_R, sums_O = quantize_rows_fwd(dout_RO.contiguous(), None, scale_O, sums)
    return multiply(rows_RO, scale_R, columns_DO, ones_D, None, dout_RO.dtype), sums_O


def _together(vector: Tensor | None) -> Tensor | None:
    return None if vector is None else vector.contiguous()
