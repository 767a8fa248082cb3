"""The Triton kernels as registered ops. B samples, L tokens, K kept, D width, P partial sums."""

import torch
from torch import Tensor

from ..launcher import launch
from ..launches import chosen, columns
from ..registry import registered
from ..sums.launch import total
from .config import launch_config
from .kernel import unmask_tokens_bwd_kernel, unmask_tokens_fwd_kernel


@registered("mdt_fast::unmask_tokens")
def unmask_tokens_fwd(
    x_BKD: Tensor, mask_token_11D: Tensor, pos_1LD: Tensor, ids_restore_BL: Tensor
) -> Tensor:
    """Tokens [B, L, D] in the dtype of ``x``."""
    (B, K, D), L = x_BKD.shape, ids_restore_BL.shape[1]
    out_BLD = x_BKD.new_empty(B, L, D)
    if out_BLD.numel():
        config = chosen(launch_config, "unmask_tokens_fwd", x_BKD, columns(D), D, B, L)
        launch(
            unmask_tokens_fwd_kernel, (L, config.parts),
            x_BKD if K else mask_token_11D, mask_token_11D, pos_1LD, ids_restore_BL, out_BLD, B, L, K, D,
            BLOCK_D=config.block_d, num_warps=config.num_warps,
        )  # fmt: skip
    return out_BLD


@registered("mdt_fast::unmask_tokens_bwd")
def unmask_tokens_bwd(
    dout_BLD: Tensor, ids_restore_BL: Tensor, mask_token_11D: Tensor, pos_1LD: Tensor, len_keep: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, mask_token and pos; the last two in the parameters' dtypes."""
    B, L, D = dout_BLD.shape
    dx_BKD = dout_BLD.new_empty(B, len_keep, D)
    if not dout_BLD.numel():
        return dx_BKD, torch.zeros_like(mask_token_11D), torch.zeros_like(pos_1LD)
    config = chosen(launch_config, "unmask_tokens_bwd", dout_BLD, columns(D), D, B, L)
    parts_2PLD = dout_BLD.new_empty(2, config.parts, L, D, dtype=torch.float32)
    launch(
        unmask_tokens_bwd_kernel, (L, config.parts),
        dout_BLD, ids_restore_BL, dx_BKD if len_keep else dout_BLD, parts_2PLD[0], parts_2PLD[1],
        B, L, len_keep, D, BLOCK_D=config.block_d, num_warps=config.num_warps,
    )  # fmt: skip
    dmask_parts, dpos_parts = parts_2PLD
    return dx_BKD, total(dmask_parts.flatten(0, 1), mask_token_11D), total(dpos_parts, pos_1LD)


@unmask_tokens_fwd.register_fake
def _(x_BKD, mask_token_11D, pos_1LD, ids_restore_BL):  # type: ignore[no-untyped-def]
    return x_BKD.new_empty(*ids_restore_BL.shape, x_BKD.shape[2])


@unmask_tokens_bwd.register_fake
def _(dout_BLD, ids_restore_BL, mask_token_11D, pos_1LD, len_keep):  # type: ignore[no-untyped-def]
    B, _, D = dout_BLD.shape
    return dout_BLD.new_empty(B, len_keep, D), torch.empty_like(mask_token_11D), torch.empty_like(pos_1LD)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x_BKD, mask_token_11D, pos_1LD, ids_restore_BL = inputs
    ctx.len_keep = x_BKD.shape[1]
    ctx.save_for_backward(ids_restore_BL, mask_token_11D, pos_1LD)


def _backward(ctx, dout_BLD):  # type: ignore[no-untyped-def]
    return *unmask_tokens_bwd(dout_BLD.contiguous(), *ctx.saved_tensors, ctx.len_keep), None


unmask_tokens_fwd.register_autograd(_backward, setup_context=_setup_context)
