"""Two matrix products into one output, as a registered op. R rows, D width, O output width."""

import torch
from torch import Tensor

from ..checks import cast
from ..linear.op import weight_gradient_into
from ..registry import registered
from ..sums import sum_rows


def skip_linear(x: Tensor, skip: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """[..., O]. Autocast does not see into a registered op, so its casts are made here."""
    rows = [a.reshape(-1, x.shape[-1]) for a in (x, skip)]
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        rows = [a if a.dtype == torch.float64 else cast(a, dtype) for a in rows]
    return skip_linear_fwd(*rows, weight, bias).view(*x.shape[:-1], weight.shape[0])


@registered("mdt_fast::skip_linear")
def skip_linear_fwd(x_RD: Tensor, skip_RD: Tensor, weight_O2D: Tensor, bias_O: Tensor) -> Tensor:
    """[R, O] in the dtype of ``x`` and ``skip``, to which weight and bias are cast. The second product
    accumulates into the output of the first."""
    weight_x, weight_skip = cast(weight_O2D, x_RD.dtype).chunk(2, dim=1)
    out_RO = torch.addmm(cast(bias_O, x_RD.dtype), x_RD, weight_x.t())
    return out_RO.addmm_(skip_RD, weight_skip.t())


@registered("mdt_fast::skip_linear_bwd")
def skip_linear_bwd(
    dout_RO: Tensor, x_RD: Tensor, skip_RD: Tensor, weight_O2D: Tensor, bias_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, skip, weight (both halves written into one tensor) and bias; the last two in the
    parameters' dtypes."""
    (weight_x, weight_skip), D = cast(weight_O2D, x_RD.dtype).chunk(2, dim=1), x_RD.shape[1]
    dweight_O2D = weight_O2D.new_empty(weight_O2D.shape)
    weight_gradient_into(dweight_O2D[:, :D], dout_RO, x_RD)
    weight_gradient_into(dweight_O2D[:, D:], dout_RO, skip_RD)
    return dout_RO @ weight_x, dout_RO @ weight_skip, dweight_O2D, sum_rows(dout_RO, bias_dtype)


@skip_linear_fwd.register_fake
def _(x_RD, skip_RD, weight_O2D, bias_O):  # type: ignore[no-untyped-def]
    return x_RD.new_empty(x_RD.shape[0], weight_O2D.shape[0])


@skip_linear_bwd.register_fake
def _(dout_RO, x_RD, skip_RD, weight_O2D, bias_dtype):  # type: ignore[no-untyped-def]
    rows = (x_RD.new_empty(x_RD.shape), x_RD.new_empty(x_RD.shape))
    dbias_O = dout_RO.new_empty(dout_RO.shape[1], dtype=bias_dtype)
    return *rows, weight_O2D.new_empty(weight_O2D.shape), dbias_O


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.bias_dtype = inputs[3].dtype
    ctx.save_for_backward(*inputs[:3])


def _backward(ctx, dout_RO):  # type: ignore[no-untyped-def]
    return skip_linear_bwd(dout_RO.contiguous(), *ctx.saved_tensors, ctx.bias_dtype)


skip_linear_fwd.register_autograd(_backward, setup_context=_setup_context)
