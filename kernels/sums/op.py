"""Argument checks, dispatch and the registered op. R rows, D columns."""

import torch
from torch import Tensor

from .. import checks
from ..backends import launching, uses_triton
from ..registry import registered
from . import reference


def sum_rows(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Sum the rows of ``x`` [R, D], floating; returns [D] in ``dtype`` (by default the dtype of ``x``).

    On a GPU the sum is accumulated in float32 and rounded once, in an order that depends only on the shape.
    Raises ``ValueError`` if ``x`` is not a floating matrix or ``dtype`` is not floating.
    """
    checks.floating("x", x)
    checks.shape("x", x, "R", "D")
    dtype = x.dtype if dtype is None else dtype
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"dtype: got {dtype}, expected floating-point dtypes")
    if not uses_triton(x):
        return reference.sum_rows(x, dtype)
    return sum_rows_fwd(x.contiguous(), dtype)


@registered("mdt_fast::sum_rows")
def sum_rows_fwd(x_RD: Tensor, dtype: torch.dtype) -> Tensor:
    """[D]."""
    out_D = x_RD.new_empty(x_RD.shape[1], dtype=dtype)
    if not x_RD.numel():
        return out_D.zero_()
    launching(__package__).sum_rows(x_RD, out_D)
    return out_D


@sum_rows_fwd.register_fake
def _(x_RD, dtype):  # type: ignore[no-untyped-def]
    return x_RD.new_empty(x_RD.shape[1], dtype=dtype)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.shape, ctx.dtype = inputs[0].shape, inputs[0].dtype


def _backward(ctx, dout_D):  # type: ignore[no-untyped-def]
    return dout_D.to(ctx.dtype).expand(ctx.shape), None


sum_rows_fwd.register_autograd(_backward, setup_context=_setup_context)
