"""The Triton kernels as registered ops. R rows, F features, P partial sums."""

import torch
import triton
from torch import Tensor

from .config import launch_config
from .kernel import bias_gelu_bwd_kernel, bias_gelu_fwd_kernel


@torch.library.custom_op("mdt_fast::bias_gelu", mutates_args=())
def bias_gelu_fwd(x_RF: Tensor, bias_F: Tensor) -> Tensor:
    """``gelu(x + bias)``, tanh form, in the dtype of ``x``."""
    out_RF, (R, F) = torch.empty_like(x_RF), x_RF.shape
    if out_RF.numel():
        config = launch_config(R, F)
        grid = (triton.cdiv(F, config.block_f), triton.cdiv(R, config.block_r))
        bias_gelu_fwd_kernel[grid](
            x_RF, bias_F, out_RF, R, F,
            BLOCK_R=config.block_r, BLOCK_F=config.block_f, num_warps=config.num_warps,
        )  # fmt: skip
    return out_RF


@torch.library.custom_op("mdt_fast::bias_gelu_bwd", mutates_args=())
def bias_gelu_bwd(
    x_RF: Tensor, bias_F: Tensor, dout_RF: Tensor, recompute: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x and bias, and the forward pass's output again (empty unless ``recompute``)."""
    dx_RF, (R, F) = torch.empty_like(x_RF), x_RF.shape
    out_RF = dout_RF.new_empty(dout_RF.shape if recompute else 0)
    if not dx_RF.numel():
        return dx_RF, torch.zeros_like(bias_F), out_RF
    config = launch_config(R, F)
    parts_PF = x_RF.new_empty(config.parts, F, dtype=torch.float32)
    bias_gelu_bwd_kernel[(triton.cdiv(F, config.block_f), config.parts)](
        x_RF, bias_F, dout_RF, dx_RF, parts_PF, out_RF, R, F,
        RECOMPUTE=recompute, BLOCK_R=config.block_r, BLOCK_F=config.block_f, num_warps=config.num_warps,
    )  # fmt: skip
    return dx_RF, parts_PF.sum(0).to(bias_F.dtype), out_RF


@bias_gelu_fwd.register_fake
def _(x_RF, bias_F):  # type: ignore[no-untyped-def]
    return torch.empty_like(x_RF)


@bias_gelu_bwd.register_fake
def _(x_RF, bias_F, dout_RF, recompute):  # type: ignore[no-untyped-def]
    out_RF = dout_RF.new_empty(dout_RF.shape if recompute else 0)
    return torch.empty_like(x_RF), torch.empty_like(bias_F), out_RF


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs)


def _backward(ctx, dout_RF):  # type: ignore[no-untyped-def]
    return bias_gelu_bwd(*ctx.saved_tensors, dout_RF.contiguous(), False)[:2]


bias_gelu_fwd.register_autograd(_backward, setup_context=_setup_context)
