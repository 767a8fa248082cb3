"""GELU and the linear layer after it, as one autograd function.

The backward pass recomputes the activation, or reads the saved one, which spares it a write.
R rows, F features, O output width.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import checks
from ..backends import uses_csrc, uses_triton
from ..float8 import op as in_float8
from ..linear.op import Float8, for_product, gradients, operand, product, weight_gradient
from ..registry import applied, once
from ..rows import as_before, as_rows
from . import reference
from .op import bias_gelu
from .registered import bias_gelu_bwd, bias_gelu_fwd


def gelu_linear(
    x: Tensor,
    bias_F: Tensor,
    weight_OF: Tensor,
    bias_O: Tensor | None = None,
    *,
    recompute: bool = True,
    float8: Float8 = False,
) -> Tensor:
    """``F.linear(bias_gelu(x, bias_F), weight, bias_O)``: ``x`` [..., F] -> [..., O].

    ``bias_F`` [F] is added before the activation (see :func:`bias_gelu`). ``weight`` [O, F] and ``bias_O``
    [O] belong to the linear layer and have the dtype of ``x``, or any floating dtype under autocast. ``x`` is
    saved for the backward pass; the activation is saved only with ``recompute=False``. For ``float8``, see
    :func:`mdt_fast.kernels.linear`.

    Raises ``ValueError`` for shapes or dtypes that do not fit.
    """
    checks.floating("x", x)
    features = checks.width("x", x)
    checks.shape("bias_F", bias_F, features)
    checks.floating_on("bias_F", bias_F, x)
    checks.columns("weight", weight_OF, features, "O")
    dtype = checks.layer(x, weight_OF, bias_O)
    if checks.plain_only():
        return F.linear(bias_gelu(x, bias_F), weight_OF, bias_O)
    out = applied(_Linear, as_rows(x), bias_F.contiguous(), weight_OF, bias_O, dtype, recompute, float8)
    return as_before(out, x)


class _Linear(torch.autograd.Function):
    """x [R, F], weight [O, F] -> [R, O] in ``dtype``; weight and bias are cast to it here
    or in the product."""

    @staticmethod
    def forward(ctx: Any, x, bias_F, weight, bias, dtype, recompute, float8):  # type: ignore[no-untyped-def]
        ctx.dtypes = weight.dtype, None if bias is None else bias.dtype
        recompute = recompute or not weight.requires_grad
        bias = None if bias is None else for_product(ctx, bias, dtype)
        (factor, scale), kept = operand(ctx, weight, dtype, float8)
        if scale is not None and recompute:
            bias = None if bias is None else checks.cast(bias, dtype)
            activation, out = None, in_float8.product_of_gelu(x, bias_F, factor, scale, bias, dtype)
        else:
            activation = checks.cast(_forward(ctx, x, bias_F), dtype)
            out = product(activation, factor, bias, scale)
        ctx.save_for_backward(x, bias_F, *kept, None if recompute else activation)
        return out

    @staticmethod
    @once
    def backward(ctx: Any, dout: Tensor):  # type: ignore[no-untyped-def]
        (x, bias_F, *kept_weight, _, kept), (weight_dtype, bias_dtype) = ctx.saved_tensors, ctx.dtypes
        needs, dout = ctx.needs_input_grad, dout.contiguous()
        dactivation, dbias = gradients(dout, kept_weight, bias_dtype if needs[3] else None)
        dx, dbias_F, activation = _backward(x, bias_F, dactivation, kept is None and needs[2])
        activation = activation if kept is None else kept
        dweight = weight_gradient(dout, activation, weight_dtype) if needs[2] else None
        return dx, dbias_F, dweight, dbias, None, None, None


def _forward(ctx: Any, x: Tensor, bias_F: Tensor) -> Tensor:
    if not (uses_triton(x) or uses_csrc(x, bias_F)):
        return reference.bias_gelu(x, bias_F.to(x.dtype))
    return bias_gelu_fwd.within(ctx)(x, bias_F)


def _backward(x: Tensor, bias_F: Tensor, dout: Tensor, recompute: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x and the first bias, and the activation in the dtype of ``dout`` (a placeholder without
    ``recompute``)."""
    if not (uses_triton(x) or uses_csrc(x, bias_F, dout)):
        z = x + bias_F.to(x.dtype)
        dx = torch.ops.aten.gelu_backward(dout.to(x.dtype), z, approximate="tanh")
        activation = F.gelu(z, approximate="tanh").to(dout.dtype) if recompute else dout
        return dx, dx.sum(0).to(bias_F.dtype), activation
    return bias_gelu_bwd(x, bias_F, dout, recompute)
