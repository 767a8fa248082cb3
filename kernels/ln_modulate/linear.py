"""A modulated layer norm and the linear layer after it, as one autograd function.

The weight gradient needs the modulated norm. By default it is not saved, and the backward pass recomputes it;
with ``recompute=False`` it is saved, which spares the backward pass a write.
B samples, R rows (tokens of all samples), D width, O output width.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import checks
from ..backends import uses_triton
from ..float8.registered import multiply, rounds
from ..linear.op import Float8, for_product, gradients, operand, product, product_gelu, weight_gradient
from ..registry import applied, needs_grad, once
from ..rows import as_before, as_rows
from . import reference
from .op import check, columns_together, gate_residual_ln_modulate, ln_modulate, serves
from .registered import ln_modulate_bwd, ln_modulate_float8_fwd, ln_modulate_fwd


def ln_modulate_linear(
    x_BLD: Tensor,
    shift_BD: Tensor,
    scale_BD: Tensor,
    weight_OD: Tensor,
    bias_O: Tensor | None = None,
    *,
    offsets: Tensor | None = None,
    eps: float = 1e-6,
    recompute: bool = True,
    float8: Float8 = False,
) -> Tensor:
    """``F.linear(ln_modulate(x, shift, scale), weight, bias)``: [B, L, O].

    For ``x``, ``shift``, ``scale``, ``offsets`` (cumulative sequence lengths) and ``eps``, see
    :func:`ln_modulate`. ``weight`` [O, D] and ``bias`` [O] have the dtype of ``x``; under autocast they may
    have any floating dtype and are cast as for a linear layer. ``x`` and two numbers per row are saved for
    the backward pass. The modulated norm, which the weight gradient needs, is saved only with
    ``recompute=False``. For ``float8``, see :func:`mdt_fast.kernels.linear`.

    Raises ``ValueError`` for arguments that do not fit.
    """
    return residual_ln_modulate_linear(
        x_BLD, shift_BD, scale_BD, weight_OD, bias_O,
        offsets=offsets, eps=eps, recompute=recompute, float8=float8,
    )[1]  # fmt: skip


def residual_ln_modulate_linear(
    x_BLD: Tensor,
    shift_BD: Tensor,
    scale_BD: Tensor,
    weight_OD: Tensor,
    bias_O: Tensor | None = None,
    *,
    offsets: Tensor | None = None,
    eps: float = 1e-6,
    recompute: bool = True,
    float8: Float8 = False,
) -> tuple[Tensor, Tensor]:
    """``x`` and the result of :func:`ln_modulate_linear`, for an ``x`` that is also the residual.

    Use the returned ``x`` as the residual: the backward kernel then adds the gradients of both paths as it
    writes them. The returned ``x`` may share memory with the argument, so change neither in place.
    """
    check(x_BLD, offsets, shift=shift_BD, scale=scale_BD)
    eps = checks.eps(eps)
    dtype = _dtype(x_BLD, weight_OD, bias_O)
    if checks.plain_only():
        normal = ln_modulate(x_BLD, shift_BD, scale_BD, offsets=offsets, eps=eps)
        return x_BLD, F.linear(normal, weight_OD, bias_O)
    residual, out = applied(
        _Linear, as_rows(x_BLD), None, None, columns_together(shift_BD), columns_together(scale_BD),
        weight_OD, bias_O, offsets, eps, dtype, recompute, False, float8,
    )  # fmt: skip
    return as_before(residual, x_BLD), as_before(out, x_BLD)


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
    recompute: bool = True,
    gelu: bool = False,
    float8: Float8 = False,
) -> tuple[Tensor, Tensor]:
    """The new residual ``r = x + gate * y``, and ``F.linear(ln_modulate(r, shift, scale), weight, bias)``.

    With ``gelu``, GELU (tanh form) is applied to the second result. This is meant for passes without
    gradients, where GELU is part of the product if the library offers that. The other arguments are those of
    :func:`gate_residual_ln_modulate` and :func:`ln_modulate_linear`. ``x`` and ``y`` are saved for the
    backward pass. Raises ``ValueError`` for arguments that do not fit.
    """
    check(x_BLD, offsets, gate=gate_BD, shift=shift_BD, scale=scale_BD)
    eps = checks.eps(eps)
    checks.shape("y", y_BLD, *x_BLD.shape)
    checks.floating_on("y", y_BLD, x_BLD)
    dtype = _dtype(x_BLD, weight_OD, bias_O)
    if checks.plain_only():
        residual, normal = gate_residual_ln_modulate(
            x_BLD, y_BLD, gate_BD, shift_BD, scale_BD, offsets=offsets, eps=eps
        )
        out = F.linear(normal, weight_OD, bias_O)
        return residual, F.gelu(out, approximate="tanh") if gelu else out
    tensors = x_BLD, y_BLD, gate_BD, shift_BD, scale_BD, weight_OD, bias_O
    at_once = gelu and float8 is False and not needs_grad(tensors)
    residual, out = applied(
        _Linear, as_rows(x_BLD), as_rows(y_BLD), *map(columns_together, (gate_BD, shift_BD, scale_BD)),
        weight_OD, bias_O, offsets, eps, dtype, recompute, at_once, float8,
    )  # fmt: skip
    if gelu and not at_once:
        out = F.gelu(out, approximate="tanh")
    return as_before(residual, x_BLD), as_before(out, x_BLD)


class _Linear(torch.autograd.Function):
    """x, y [R, D], gate, shift, scale [B, D], weight [O, D] -> residual [R, D] (x if there is no y) and the
    layer's output [R, O] in ``dtype``.

    Weight and bias are cast to ``dtype`` here or in the product. ``gelu`` activates the output and has no
    gradient.
    """

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx: Any, x, y, gate, shift, scale, weight, bias, offsets, eps, dtype, recompute, gelu, float8
    ):
        ctx.set_materialize_grads(False)  # the residual may be unused
        ctx.dtypes = weight.dtype, None if bias is None else bias.dtype
        ctx.out = dtype, len(weight)
        recompute = recompute or not weight.requires_grad
        (factor, factor_scale), kept_weight = operand(ctx, weight, dtype, float8)
        bias = None if bias is None else for_product(ctx, bias, dtype)
        if factor_scale is not None and recompute and uses_triton(x) and rounds(x):
            serves(x)
            normals = ln_modulate_float8_fwd.within(ctx)(x, y, gate, shift, scale, offsets, eps)
            residual, rows, rows_scale, mean, rstd = normals
            bias = None if bias is None else checks.cast(bias, dtype)
            kept, out = None, multiply.within(ctx)(rows, rows_scale, factor, factor_scale, bias, dtype)
        else:
            forward = ln_modulate_fwd.within(ctx) if serves(x, y, gate, shift, scale) else reference.forward
            residual, normal, mean, rstd = forward(x, y, gate, shift, scale, offsets, eps, dtype)
            kept = None if recompute else normal
            out = product_gelu(normal, factor, bias) if gelu else product(normal, factor, bias, factor_scale)
        ctx.save_for_backward(x, y, gate, shift, scale, offsets, mean, rstd, *kept_weight, kept)
        return x if y is None else residual, out

    @staticmethod
    @once
    def backward(ctx: Any, dresidual: Tensor | None, dout: Tensor | None):  # type: ignore[no-untyped-def]
        x, y, gate, shift, scale, offsets, mean, rstd, *kept_weight, _, kept = ctx.saved_tensors
        needs, (weight_dtype, bias_dtype) = ctx.needs_input_grad, ctx.dtypes
        if dout is None:  # only the residual is used
            if y is None:
                return dresidual, *(None,) * 12
            dtype, width = ctx.out
            dout = x.new_zeros(len(x), width, dtype=dtype)
        dout, dresidual = dout.contiguous(), None if dresidual is None else dresidual.contiguous()
        dnormal, dbias = gradients(dout, kept_weight, bias_dtype if needs[6] else None)
        dx, dy, dgate, dshift, dscale, normal = _backward(
            x,
            y,
            gate,
            shift,
            scale,
            offsets,
            mean,
            rstd,
            dresidual,
            dnormal,
            kept is None and needs[5],
        )
        normal = normal if kept is None else kept
        dweight = weight_gradient(dout, normal, weight_dtype) if needs[5] else None
        return dx, dy, dgate, dshift, dscale, dweight, dbias, *(None,) * 6


def _backward(x, y, gate, shift, scale, offsets, mean, rstd, dresidual, dout, recompute):  # type: ignore[no-untyped-def]
    if not serves(x, y, gate, shift, scale, dresidual, dout):
        mean, rstd = mean.view(-1, 1), rstd.view(-1, 1)  # [R] from a kernel, if only the backward is in vmap
        return reference.backward(x, y, gate, shift, scale, offsets, mean, rstd, dresidual, dout)
    dx, dy, dgate, *rest = ln_modulate_bwd(
        x, y, gate, shift, scale, offsets, mean, rstd, dresidual, dout, recompute
    )
    return (dx, *((None, None) if y is None else (dy, dgate)), *rest)


def _dtype(x: Tensor, weight_OD: Tensor, bias_O: Tensor | None) -> torch.dtype:
    """The dtype of the layer's products."""
    checks.columns("weight", weight_OD, x.shape[-1], "O")
    return checks.layer(x, weight_OD, bias_O)
