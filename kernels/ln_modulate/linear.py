"""A modulated normal and the linear layer that reads it, as one step of autograd.

The normal is computed again in the backward pass, where the layer's weight gradient needs it: it is not kept.
B samples, R rows of all samples, D width, O output width.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import checks
from ..linear.op import input_gradient, product, weight_gradient
from . import reference
from .op import check, columns_together, gate_residual_ln_modulate, ln_modulate, serves
from .registered import ln_modulate_bwd, ln_modulate_fwd


def ln_modulate_linear(
    x_BLD: Tensor,
    shift_BD: Tensor,
    scale_BD: Tensor,
    weight_OD: Tensor,
    bias_O: Tensor | None = None,
    *,
    offsets: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """``F.linear(ln_modulate(x, shift, scale), weight, bias)``: [B, L, O].

    ``x``, ``shift``, ``scale``, ``offsets``, ``eps``: see :func:`ln_modulate`; ``weight`` [O, D], ``bias``
    [O], in the dtype of ``x`` (under autocast any floating dtype: it casts as for a linear layer). For the
    backward pass ``x`` and two numbers a row are kept, not the normal. Raises ``ValueError`` for what does
    not fit.
    """
    check(x_BLD, offsets, shift=shift_BD, scale=scale_BD)
    weight, bias = _layer(x_BLD, weight_OD, bias_O)
    if checks.plain_only():
        return F.linear(ln_modulate(x_BLD, shift_BD, scale_BD, offsets=offsets, eps=eps), weight, bias)
    shift_BD, scale_BD = columns_together(shift_BD), columns_together(scale_BD)
    out = _Linear.apply(_rows(x_BLD), None, None, shift_BD, scale_BD, weight, bias, offsets, eps)
    return out.view(*x_BLD.shape[:-1], weight.shape[0])


def gate_residual_ln_modulate_linear(
    x_BLD: Tensor,
    y_BLD: Tensor,
    gate_BD: Tensor,
    shift_BD: Tensor,
    scale_BD: Tensor,
    weight_OD: Tensor,
    bias_O: Tensor | None = None,
    *,
    offsets: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """The new residual ``r = x + gate * y``, and ``F.linear(ln_modulate(r, shift, scale), weight, bias)``.

    Arguments as in :func:`gate_residual_ln_modulate` and :func:`ln_modulate_linear`; kept for the backward
    pass are ``x`` and ``y``. Raises ``ValueError`` for what does not fit.
    """
    check(x_BLD, offsets, gate=gate_BD, shift=shift_BD, scale=scale_BD)
    checks.shape("y", y_BLD, *x_BLD.shape)
    checks.floating_on("y", y_BLD, x_BLD)
    weight, bias = _layer(x_BLD, weight_OD, bias_O)
    if checks.plain_only():
        residual, normal = gate_residual_ln_modulate(
            x_BLD, y_BLD, gate_BD, shift_BD, scale_BD, offsets=offsets, eps=eps
        )
        return residual, F.linear(normal, weight, bias)
    residual, out = _Linear.apply(
        _rows(x_BLD), _rows(y_BLD), *map(columns_together, (gate_BD, shift_BD, scale_BD)), weight,
        bias, offsets, eps,
    )  # fmt: skip
    return residual.view_as(x_BLD), out.view(*x_BLD.shape[:-1], weight.shape[0])


class _Linear(torch.autograd.Function):
    """x, y [R, D], gate, shift, scale [B, D], weight [O, D] -> (residual [R, D],) linear [R, O]."""

    @staticmethod
    def forward(ctx: Any, x, y, gate, shift, scale, weight, bias, offsets, eps):  # type: ignore[no-untyped-def]
        residual, normal, mean, rstd = _forward(x, y, gate, shift, scale, offsets, eps, weight.dtype)
        ctx.gated, ctx.with_bias = y is not None, bias is not None
        ctx.save_for_backward(x, y, gate, shift, scale, offsets, mean, rstd, weight)
        out = product(normal, weight, bias)
        return (residual, out) if ctx.gated else out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor):  # type: ignore[no-untyped-def]
        x, y, gate, shift, scale, offsets, mean, rstd, weight = ctx.saved_tensors
        dout = gradients[-1].contiguous()
        dresidual = gradients[0].contiguous() if ctx.gated else None
        dx, dy, dgate, dshift, dscale, normal = _backward(
            x, y, gate, shift, scale, offsets, mean, rstd, dresidual, input_gradient(dout, weight)
        )
        dweight = weight_gradient(dout, normal) if ctx.needs_input_grad[5] else None
        dbias = dout.sum(0) if ctx.with_bias else None
        return dx, dy, dgate, dshift, dscale, dweight, dbias, None, None


def _forward(x, y, gate, shift, scale, offsets, eps, dtype):  # type: ignore[no-untyped-def]
    if not serves(x, y, gate, shift, scale):
        return reference.forward(x, y, gate, shift, scale, offsets, eps, dtype)
    return ln_modulate_fwd(x, y, gate, shift, scale, offsets, eps, dtype)


def _backward(x, y, gate, shift, scale, offsets, mean, rstd, dresidual, dout):  # type: ignore[no-untyped-def]
    if not serves(x, y, gate, shift, scale, dresidual, dout):
        return reference.backward(x, y, gate, shift, scale, offsets, mean, rstd, dresidual, dout)
    dx, dy, dgate, *rest = ln_modulate_bwd(
        x, y, gate, shift, scale, offsets, mean, rstd, dresidual, dout, True
    )
    return (dx, *((None, None) if y is None else (dy, dgate)), *rest)


def _layer(x: Tensor, weight_OD: Tensor, bias_O: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The layer's parameters, cast where autocast would; then nothing inside is cast."""
    checks.shape("weight", weight_OD, "O", x.shape[-1])
    return checks.layer(x, weight_OD, bias_O)


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1]).contiguous()
