"""Gather and merge as registered ops. B samples, L tokens, K kept, N = L - K masked, D width."""

import torch
from torch import Tensor

from ..launcher import launch
from ..launches import chosen, columns
from ..registry import registered
from .config import row_config
from .kernel import (
    gather_tokens_bwd_kernel,
    gather_tokens_fwd_kernel,
    merge_tokens_bwd_kernel,
    merge_tokens_fwd_kernel,
)


@registered("mdt_fast::gather_tokens")
def gather_tokens_fwd(x_BLD: Tensor, ids_BK: Tensor, ids_restore_BL: Tensor | None) -> Tensor:
    """Tokens [B, K, D]; only the backward pass uses ``ids_restore``."""
    (B, L, D), K = x_BLD.shape, ids_BK.shape[1]
    out_BKD = x_BLD.new_empty(B, K, D)
    if out_BKD.numel():
        config = chosen(row_config, "gather_tokens_fwd", x_BLD, columns(D), D)
        launch(
            gather_tokens_fwd_kernel, (B * K,),
            x_BLD, ids_BK, out_BKD, L, K, D, BLOCK_D=config.block_d, num_warps=config.num_warps,
        )  # fmt: skip
    return out_BKD


@registered("mdt_fast::gather_tokens_bwd")
def gather_tokens_bwd(dout_BKD: Tensor, ids_BK: Tensor, ids_restore_BL: Tensor | None, tokens: int) -> Tensor:
    """Gradient of x [B, ``tokens``, D]."""
    (B, K, D), L = dout_BKD.shape, tokens
    dx_BLD = dout_BKD.new_empty(B, L, D)
    if not K:
        return dx_BLD.zero_()
    if dx_BLD.numel():
        config = chosen(row_config, "gather_tokens_bwd", dout_BKD, columns(D), D)
        launch(
            gather_tokens_bwd_kernel, (B * L,),
            dout_BKD, ids_BK, ids_BK if ids_restore_BL is None else ids_restore_BL, dx_BLD, L, K, D,
            RESTORE=ids_restore_BL is not None, BLOCK_K=config.block_k, BLOCK_D=config.block_d,
            num_warps=config.num_warps,
        )  # fmt: skip
    return dx_BLD


@registered("mdt_fast::merge_tokens")
def merge_tokens_fwd(x_BLD: Tensor, computed_BND: Tensor, ids_restore_BL: Tensor) -> Tensor:
    """Tokens [B, L, D]."""
    (B, L, D), N = x_BLD.shape, computed_BND.shape[1]
    out_BLD = torch.empty_like(x_BLD)
    if out_BLD.numel():
        config = chosen(row_config, "merge_tokens_fwd", x_BLD, columns(D), D)
        launch(
            merge_tokens_fwd_kernel, (B * L,),
            x_BLD, computed_BND if N else x_BLD, ids_restore_BL, out_BLD, L, N, D,
            BLOCK_D=config.block_d, num_warps=config.num_warps,
        )  # fmt: skip
    return out_BLD


@registered("mdt_fast::merge_tokens_bwd")
def merge_tokens_bwd(dout_BLD: Tensor, ids_restore_BL: Tensor, masked: int) -> tuple[Tensor, Tensor]:
    """Gradients of x [B, L, D] and of the computed tokens [B, ``masked``, D]."""
    B, L, D = dout_BLD.shape
    dx_BLD, dcomputed_BND = torch.empty_like(dout_BLD), dout_BLD.new_empty(B, masked, D)
    if dx_BLD.numel():
        config = chosen(row_config, "merge_tokens_bwd", dout_BLD, columns(D), D)
        launch(
            merge_tokens_bwd_kernel, (B * L,),
            dout_BLD, ids_restore_BL, dx_BLD, dcomputed_BND if masked else dx_BLD, L, masked, D,
            BLOCK_D=config.block_d, num_warps=config.num_warps,
        )  # fmt: skip
    return dx_BLD, dcomputed_BND


@gather_tokens_fwd.register_fake
def _(x_BLD, ids_BK, ids_restore_BL):  # type: ignore[no-untyped-def]
    return x_BLD.new_empty(*ids_BK.shape, x_BLD.shape[2])


@gather_tokens_bwd.register_fake
def _(dout_BKD, ids_BK, ids_restore_BL, tokens):  # type: ignore[no-untyped-def]
    return dout_BKD.new_empty(dout_BKD.shape[0], tokens, dout_BKD.shape[2])


@merge_tokens_fwd.register_fake
def _(x_BLD, computed_BND, ids_restore_BL):  # type: ignore[no-untyped-def]
    return torch.empty_like(x_BLD)


@merge_tokens_bwd.register_fake
def _(dout_BLD, ids_restore_BL, masked):  # type: ignore[no-untyped-def]
    B, _, D = dout_BLD.shape
    return torch.empty_like(dout_BLD), dout_BLD.new_empty(B, masked, D)


def _gather_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x_BLD, ids_BK, ids_restore_BL = inputs
    ctx.tokens = x_BLD.shape[1]
    ctx.save_for_backward(ids_BK, ids_restore_BL)


def _gather_backward(ctx, dout_BKD):  # type: ignore[no-untyped-def]
    return gather_tokens_bwd(dout_BKD.contiguous(), *ctx.saved_tensors, ctx.tokens), None, None


def _merge_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    _, computed_BND, ids_restore_BL = inputs
    ctx.masked = computed_BND.shape[1]
    ctx.save_for_backward(ids_restore_BL)


def _merge_backward(ctx, dout_BLD):  # type: ignore[no-untyped-def]
    return *merge_tokens_bwd(dout_BLD.contiguous(), *ctx.saved_tensors, ctx.masked), None


gather_tokens_fwd.register_autograd(_gather_backward, setup_context=_gather_context)
merge_tokens_fwd.register_autograd(_merge_backward, setup_context=_merge_context)
