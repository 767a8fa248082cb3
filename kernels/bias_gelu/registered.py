"""The kernels as registered ops: Triton's, or those of ``csrc/`` on a CPU. R rows, F features."""

from typing import Any

import torch
from torch import Tensor

from .. import native
from ..backends import launching, on_triton
from ..registry import registered


@registered("mdt_fast::bias_gelu")
def bias_gelu_fwd(x_RF: Tensor, bias_F: Tensor) -> Tensor:
    """``gelu(x + bias)``, tanh form, in the dtype of ``x``."""
    out_RF = torch.empty_like(x_RF)
    if out_RF.numel():
        _kernels(x_RF).bias_gelu_fwd(x_RF, bias_F[None], out_RF)
    return out_RF


@registered("mdt_fast::bias_gelu_bwd")
def bias_gelu_bwd(
    x_RF: Tensor, bias_F: Tensor, dout_RF: Tensor, recompute: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x and bias, and the forward pass's output again (empty unless ``recompute``)."""
    gradients = dx_RF, dbias_F, out_RF = _gradients(x_RF, bias_F, dout_RF, recompute)
    if not dx_RF.numel():
        dbias_F.zero_()
        return gradients
    out = out_RF if recompute else None
    _kernels(x_RF).bias_gelu_bwd(x_RF, bias_F[None], dout_RF, dx_RF, dbias_F[None], out)
    return gradients


def _kernels(x: Tensor) -> Any:
    if not on_triton(x):
        return native.CPU
    return launching(__package__)


@bias_gelu_fwd.register_fake
def _(x_RF, bias_F):  # type: ignore[no-untyped-def]
    return torch.empty_like(x_RF)


@bias_gelu_bwd.register_fake
def _(x_RF, bias_F, dout_RF, recompute):  # type: ignore[no-untyped-def]
    return _gradients(x_RF, bias_F, dout_RF, recompute)


def _gradients(
    x_RF: Tensor, bias_F: Tensor, dout_RF: Tensor, recompute: bool
) -> tuple[Tensor, Tensor, Tensor]:
    out_RF = dout_RF.new_empty(dout_RF.shape if recompute else 0)
    return torch.empty_like(x_RF), torch.empty_like(bias_F), out_RF


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs)


def _backward(ctx, dout_RF):  # type: ignore[no-untyped-def]
    return bias_gelu_bwd(*ctx.saved_tensors, dout_RF.contiguous(), False)[:2]


bias_gelu_fwd.register_autograd(_backward, setup_context=_setup_context)
