"""The kernels as registered ops: Triton's, or those of ``csrc/`` on a CPU.

B samples, R rows (tokens of all samples), D width.
"""

from typing import Any

import torch
from torch import Tensor

from .. import native
from ..backends import launching, on_triton
from ..float8.reference import FLOAT8
from ..registry import registered


@registered("mdt_fast::ln_modulate")
def ln_modulate_fwd(
    x_RD: Tensor,
    y_RD: Tensor | None,
    gate_BD: Tensor | None,
    shift_BD: Tensor,
    scale_BD: Tensor,
    offsets: Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Residual (empty without ``y``), modulated norm in ``dtype``, mean [R] and 1/std [R] in float32."""
    outputs = residual_RD, out_RD, mean_R, rstd_R = _outputs(x_RD, y_RD, dtype)
    if len(x_RD):
        _kernels(x_RD).ln_modulate_fwd(
            x_RD, y_RD, gate_BD, shift_BD, scale_BD, _together(offsets), float(eps),
            None if y_RD is None else residual_RD, out_RD, mean_R, rstd_R,
        )  # fmt: skip
    return outputs


@registered("mdt_fast::ln_modulate_float8")
def ln_modulate_float8_fwd(
    x_RD: Tensor,
    y_RD: Tensor | None,
    gate_BD: Tensor | None,
    shift_BD: Tensor,
    scale_BD: Tensor,
    offsets: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The same with the modulated norm in float8, followed by its row scales [R] in float32. Triton only."""
    residual_RD, out_RD, out_scale_R, mean_R, rstd_R = outputs = _in_float8(x_RD, y_RD)
    if len(x_RD):
        launching(__package__).ln_modulate_fwd(
            x_RD, y_RD, gate_BD, shift_BD, scale_BD, _together(offsets), float(eps),
            None if y_RD is None else residual_RD, out_RD, mean_R, rstd_R, out_scale_R,
        )  # fmt: skip
    return outputs


@registered("mdt_fast::ln_modulate_bwd")
def ln_modulate_bwd(
    x_RD: Tensor,
    y_RD: Tensor | None,
    gate_BD: Tensor | None,
    shift_BD: Tensor,
    scale_BD: Tensor,
    offsets: Tensor | None,
    mean_R: Tensor,
    rstd_R: Tensor,
    dresidual_RD: Tensor | None,
    dout_RD: Tensor,
    recompute: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, y, gate, shift and scale, then the forward pass's output again in the dtype of ``dout``
    (empty unless ``recompute``)."""
    gradients = dx_RD, dy_RD, dgate_BD, dshift_BD, dscale_BD, out_RD = _gradients(
        x_RD, y_RD, gate_BD, shift_BD, scale_BD, dout_RD, recompute
    )
    if not len(x_RD):
        for sums_BD in (dgate_BD, dshift_BD, dscale_BD):
            sums_BD.zero_()
        return gradients
    gated = y_RD is not None
    _kernels(x_RD).ln_modulate_bwd(
        x_RD, y_RD, gate_BD, shift_BD, scale_BD, _together(offsets), mean_R, rstd_R, dresidual_RD, dout_RD,
        dx_RD, dy_RD if gated else None, dgate_BD if gated else None, dshift_BD, dscale_BD,
        out_RD if recompute else None,
    )  # fmt: skip
    return gradients


@registered("mdt_fast::gate_residual")
def gate_residual_fwd(x_RD: Tensor, y_RD: Tensor, gate_BD: Tensor, offsets: Tensor | None) -> Tensor:
    """``x + gate * y`` in the dtype of ``x``."""
    out_RD = torch.empty_like(x_RD)
    if len(x_RD):
        _kernels(x_RD).gate_residual_fwd(x_RD, y_RD, gate_BD, _together(offsets), out_RD)
    return out_RD


@registered("mdt_fast::gate_residual_bwd")
def gate_residual_bwd(
    y_RD: Tensor, gate_BD: Tensor, offsets: Tensor | None, dout_RD: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of y and gate."""
    dy_RD, dgate_BD = torch.empty_like(y_RD), gate_BD.new_empty(gate_BD.shape)
    if not len(y_RD):
        return dy_RD, dgate_BD.zero_()
    _kernels(y_RD).gate_residual_bwd(y_RD, gate_BD, _together(offsets), dout_RD, dy_RD, dgate_BD)
    return dy_RD, dgate_BD


def _together(offsets: Tensor | None) -> Tensor | None:
    """Contiguous, as the kernels read them."""
    return None if offsets is None else offsets.contiguous()


def _kernels(x: Tensor) -> Any:
    if not on_triton(x):
        return native.CPU
    return launching(__package__)


@ln_modulate_fwd.register_fake
def _(x_RD, y_RD, gate_BD, shift_BD, scale_BD, offsets, eps, dtype):  # type: ignore[no-untyped-def]
    return _outputs(x_RD, y_RD, dtype)


@ln_modulate_float8_fwd.register_fake
def _(x_RD, y_RD, gate_BD, shift_BD, scale_BD, offsets, eps):  # type: ignore[no-untyped-def]
    return _in_float8(x_RD, y_RD)


@ln_modulate_bwd.register_fake
def _(x_RD, y_RD, gate_BD, shift_BD, scale_BD, offsets, mean_R, rstd_R, dresidual_RD, dout_RD, recompute):  # type: ignore[no-untyped-def]
    return _gradients(x_RD, y_RD, gate_BD, shift_BD, scale_BD, dout_RD, recompute)


@gate_residual_fwd.register_fake
def _(x_RD, y_RD, gate_BD, offsets):  # type: ignore[no-untyped-def]
    return torch.empty_like(x_RD)


@gate_residual_bwd.register_fake
def _(y_RD, gate_BD, offsets, dout_RD):  # type: ignore[no-untyped-def]
    return torch.empty_like(y_RD), gate_BD.new_empty(gate_BD.shape)


def _outputs(x_RD: Tensor, y_RD: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    R = x_RD.shape[0]
    residual_RD = x_RD.new_empty(0) if y_RD is None else torch.empty_like(x_RD)
    statistics = (x_RD.new_empty(R, dtype=torch.float32), x_RD.new_empty(R, dtype=torch.float32))
    return residual_RD, x_RD.new_empty(x_RD.shape, dtype=dtype), *statistics


def _in_float8(x_RD: Tensor, y_RD: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    residual_RD, out_RD, mean_R, rstd_R = _outputs(x_RD, y_RD, FLOAT8)
    return residual_RD, out_RD, torch.empty_like(mean_R), mean_R, rstd_R


def _gradients(
    x_RD: Tensor,
    y_RD: Tensor | None,
    gate_BD: Tensor | None,
    shift_BD: Tensor,
    scale_BD: Tensor,
    dout_RD: Tensor,
    recompute: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    gated = (x_RD.new_empty(0), x_RD.new_empty(0))
    if y_RD is not None and gate_BD is not None:
        gated = (torch.empty_like(y_RD), gate_BD.new_empty(gate_BD.shape))
    sums = (shift_BD.new_empty(shift_BD.shape), scale_BD.new_empty(scale_BD.shape))
    out_RD = dout_RD.new_empty(dout_RD.shape if recompute else 0)
    return torch.empty_like(x_RD), *gated, *sums, out_RD


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x_RD, y_RD, gate_BD, shift_BD, scale_BD, offsets, _, _ = inputs
    mean_R, rstd_R = output[2:]
    ctx.mark_non_differentiable(mean_R, rstd_R)
    ctx.set_materialize_grads(False)  # the residual may be unused
    ctx.gated, ctx.dtype = y_RD is not None, output[1].dtype
    ctx.save_for_backward(x_RD, y_RD, gate_BD, shift_BD, scale_BD, offsets, mean_R, rstd_R)


def _backward(ctx, dresidual_RD, dout_RD, _dmean, _drstd):  # type: ignore[no-untyped-def]
    saved = ctx.saved_tensors  # once: checkpointing refuses a second time
    if dout_RD is None:  # only the residual is used
        dout_RD = saved[0].new_zeros(saved[0].shape, dtype=ctx.dtype)
    dresidual_RD = dresidual_RD.contiguous() if ctx.gated and dresidual_RD is not None else None
    gradients = ln_modulate_bwd(*saved, dresidual_RD, dout_RD.contiguous(), False)
    dx, dy, dgate, dshift, dscale, _ = gradients
    return dx, dy if ctx.gated else None, dgate if ctx.gated else None, dshift, dscale, None, None, None


def _gate_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs[1:])


def _gate_backward(ctx, dout_RD):  # type: ignore[no-untyped-def]
    dout_RD = dout_RD.contiguous()
    return dout_RD, *gate_residual_bwd(*ctx.saved_tensors, dout_RD), None


ln_modulate_fwd.register_autograd(_backward, setup_context=_setup_context)
gate_residual_fwd.register_autograd(_gate_backward, setup_context=_gate_context)
