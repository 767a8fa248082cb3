"""oneDNN's products as registered ops. R rows, D input width, O output width."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backends import uses_csrc
from ..registry import registered

MIN_FLOPS = 1e8
"""Below it, oneDNN saves less than its overhead: 0.01 to 0.2 ms per call, more with a transposed operand."""


def worthwhile(elements: int, outputs: int) -> bool:
    """Whether oneDNN pays off for a product of ``elements`` input elements with ``outputs`` outputs."""
    return 2 * elements * outputs >= MIN_FLOPS


@registered("mdt_fast::linear")
def linear_fwd(x_RD: Tensor, weight_OD: Tensor, bias_O: Tensor | None) -> Tensor:
    """[R, O]."""
    return _product(x_RD, weight_OD, bias_O)


@registered("mdt_fast::linear_gelu")
def linear_gelu_fwd(x_RD: Tensor, weight_OD: Tensor, bias_O: Tensor | None) -> Tensor:
    """GELU (tanh form) of the product, [R, O]; without gradients."""
    if not torch.backends.mkldnn.enabled or not worthwhile(x_RD.numel(), len(weight_OD)):
        return F.gelu(F.linear(x_RD, weight_OD, bias_O), approximate="tanh")
    return _pointwise(x_RD, weight_OD, bias_O, "gelu", "tanh")


@registered("mdt_fast::linear_bwd")
def linear_bwd(
    dout_RO: Tensor, x_RD: Tensor, weight_OD: Tensor, needs_x: bool, needs_weight: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of x and weight; empty if not needed."""
    dx_RD, dweight_OD = dout_RO.new_empty(0), dout_RO.new_empty(0)
    if needs_x:
        dx_RD = _product(dout_RO, weight_OD.t(), None)
    if needs_weight:
        dweight_OD = _weight_gradient(dout_RO, x_RD)
    return dx_RD, dweight_OD


@registered("mdt_fast::weight_gradient")
def weight_gradient(dout_RO: Tensor, x_RD: Tensor) -> Tensor:
    """``dout.T @ x``: [O, D]."""
    return _weight_gradient(dout_RO, x_RD)


def _weight_gradient(dout_RO: Tensor, x_RD: Tensor) -> Tensor:
    if not worthwhile(dout_RO.numel(), x_RD.shape[1]):
        return F.linear(dout_RO.t(), x_RD.t())
    if dout_RO.shape[1] > x_RD.shape[1]:
        return _turned(_product(_turned(x_RD), dout_RO.t(), None))
    return _product(_turned(dout_RO), x_RD.t(), None)


def _turned(x_RD: Tensor) -> Tensor:
    """``x.T``, contiguous: oneDNN wants the first operand so, and is slow at making this copy itself."""
    if not uses_csrc(x_RD):
        return x_RD.t().contiguous()
    out_DR = x_RD.new_empty(x_RD.shape[1], x_RD.shape[0])
    torch.ops.mdt_fast.transposed_cpu(x_RD.contiguous(), out_DR)
    return out_DR


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    # For bfloat16 without a bias, PyTorch calls oneDNN itself, with less overhead.
    ours = bias is not None or x.dtype == torch.float32
    if not ours or not torch.backends.mkldnn.enabled or not worthwhile(x.numel(), len(weight)):
        return F.linear(x, weight, bias)
    return _pointwise(x, weight, bias, "none", "")


def _pointwise(x: Tensor, weight: Tensor, bias: Tensor | None, function: str, form: str) -> Tensor:
    bias = None if bias is None else bias.contiguous()  # oneDNN reads it as if it were contiguous
    # For a slice of a wider matrix, oneDNN has only its slow reference code.
    x, weight = (m if m.is_contiguous() or m.t().is_contiguous() else m.contiguous() for m in (x, weight))
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, function, [], form)


@linear_fwd.register_fake
@linear_gelu_fwd.register_fake
def _(x_RD, weight_OD, bias_O):  # type: ignore[no-untyped-def]
    return x_RD.new_empty(x_RD.shape[0], weight_OD.shape[0])


@linear_bwd.register_fake
def _(dout_RO, x_RD, weight_OD, needs_x, needs_weight):  # type: ignore[no-untyped-def]
    return dout_RO.new_empty(x_RD.shape if needs_x else 0), dout_RO.new_empty(
        weight_OD.shape if needs_weight else 0
    )


@weight_gradient.register_fake
def _(dout_RO, x_RD):  # type: ignore[no-untyped-def]
    return dout_RO.new_empty(dout_RO.shape[1], x_RD.shape[1])


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x_RD, weight_OD, bias_O = inputs
    ctx.with_bias = bias_O is not None
    ctx.save_for_backward(x_RD, weight_OD)


def _backward(ctx, dout_RO):  # type: ignore[no-untyped-def]
    needs = ctx.needs_input_grad
    dout_RO = dout_RO.contiguous()
    dx, dweight = linear_bwd(dout_RO, *ctx.saved_tensors, needs[0], needs[1])
    dbias = dout_RO.sum(0) if ctx.with_bias and needs[2] else None
    return dx if needs[0] else None, dweight if needs[1] else None, dbias


linear_fwd.register_autograd(_backward, setup_context=_setup_context)
