"""The Triton kernels as registered ops. B images, K tokens of each, D width, P = C p p numbers per patch."""

import torch
from torch import Tensor

from ..launcher import launch
from ..launches import cdiv, chosen, columns
from ..registry import registered
from ..sums.launch import total
from ..tokens.move_op import gather_tokens_bwd
from .config import LaunchConfig, launch_config
from .kernel import patch_embed_bwd_kernel, patch_embed_fwd_kernel


@registered("mdt_fast::patch_embed")
def patch_embed_fwd(
    x_BCSS: Tensor,
    weight_DCpp: Tensor,
    bias_D: Tensor,
    pos_1LD: Tensor,
    ids_BK: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """Tokens [B, K, D] in ``dtype``."""
    (B, C, S, _), (D, _, p, _), L = x_BCSS.shape, weight_DCpp.shape, pos_1LD.shape[1]
    K = L if ids_BK is None else ids_BK.shape[1]
    out_BKD = x_BCSS.new_empty(B, K, D, dtype=dtype)
    if out_BKD.numel():
        config = _config("patch_embed_fwd", out_BKD, weight_DCpp)
        launch(
            patch_embed_fwd_kernel, (cdiv(B * K, config.block_r), cdiv(D, config.block_d)),
            x_BCSS, weight_DCpp, bias_D, pos_1LD, x_BCSS if ids_BK is None else ids_BK, out_BKD,
            B * K, L, K, C, S // p, D, p=p, IDS=ids_BK is not None, BLOCK_R=config.block_r,
            BLOCK_J=config.block_j, BLOCK_D=config.block_d,
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
    return out_BKD


@registered("mdt_fast::patch_embed_bwd")
def patch_embed_bwd(
    dout_BKD: Tensor,
    x_BCSS: Tensor,
    weight_DCpp: Tensor,
    pos_1LD: Tensor,
    ids_BK: Tensor | None,
    needs_x: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x (empty if not needed), weight, bias (in the weight's dtype) and pos."""
    (B, K, D), (_, C, p, _), L = dout_BKD.shape, weight_DCpp.shape, pos_1LD.shape[1]
    dx_BCSS = x_BCSS.new_empty(x_BCSS.shape if needs_x else (0,))
    if not dout_BKD.numel():
        dbias_D = weight_DCpp.new_zeros(D)
        return dx_BCSS.zero_(), torch.zeros_like(weight_DCpp), dbias_D, torch.zeros_like(pos_1LD)
    config = _config("patch_embed_bwd", dout_BKD, weight_DCpp)
    blocks, numbers, parts = cdiv(K, config.block_r), C * p * p, config.parts
    dweight = x_BCSS.new_empty(blocks * parts, D, numbers, dtype=torch.float32)
    dbias = x_BCSS.new_empty(blocks * parts, D, dtype=torch.float32)
    dpos = x_BCSS.new_empty(parts if ids_BK is None else 0, L, D, dtype=torch.float32)
    columns = cdiv(D, config.block_d) * cdiv(numbers, config.block_j)
    launch(
        patch_embed_bwd_kernel, (blocks, parts, columns),
        x_BCSS, x_BCSS if ids_BK is None else ids_BK, dout_BKD,
        dweight, dbias, dpos if ids_BK is None else dbias, B, L, K, C, x_BCSS.shape[2] // p, D,
        p=p, IDS=ids_BK is not None, BLOCK_R=config.block_r,
        BLOCK_J=config.block_j, BLOCK_D=config.block_d,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    if ids_BK is not None:
        dpos = gather_tokens_bwd(dout_BKD, ids_BK, None, L).float()
    if needs_x:
        dpatches = dout_BKD @ weight_DCpp.flatten(1).to(dout_BKD.dtype)
        if ids_BK is not None:
            dpatches = gather_tokens_bwd(dpatches, ids_BK, None, L)
        dx_BCSS.copy_(_fold(dpatches, x_BCSS, p))
    dbias_D = weight_DCpp.new_empty(D)
    return dx_BCSS, total(dweight, weight_DCpp), total(dbias, dbias_D), total(dpos, pos_1LD)


def _config(kernel: str, tokens_BKD: Tensor, weight_DCpp: Tensor) -> LaunchConfig:
    (B, K, D), numbers = tokens_BKD.shape, weight_DCpp[0].numel()
    return chosen(launch_config, kernel, tokens_BKD, columns(numbers), numbers, B, K, D)


def _fold(patches_BLP: Tensor, x_BCSS: Tensor, p: int) -> Tensor:
    """Patches back to images: the inverse of ``patchify``."""
    B, C, S, _ = x_BCSS.shape
    G = S // p
    return patches_BLP.view(B, G, G, C, p, p).permute(0, 3, 1, 4, 2, 5).reshape(B, C, S, S)


@patch_embed_fwd.register_fake
def _(x_BCSS, weight_DCpp, bias_D, pos_1LD, ids_BK, dtype):  # type: ignore[no-untyped-def]
    K = pos_1LD.shape[1] if ids_BK is None else ids_BK.shape[1]
    return x_BCSS.new_empty(x_BCSS.shape[0], K, weight_DCpp.shape[0], dtype=dtype)


@patch_embed_bwd.register_fake
def _(dout_BKD, x_BCSS, weight_DCpp, pos_1LD, ids_BK, needs_x):  # type: ignore[no-untyped-def]
    return (
        x_BCSS.new_empty(x_BCSS.shape if needs_x else (0,)),
        weight_DCpp.new_empty(weight_DCpp.shape),
        weight_DCpp.new_empty(weight_DCpp.shape[0]),
        pos_1LD.new_empty(pos_1LD.shape),
    )


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x_BCSS, weight_DCpp, _, pos_1LD, ids_BK, _ = inputs
    ctx.save_for_backward(x_BCSS, weight_DCpp, pos_1LD, ids_BK)


def _backward(ctx, dout_BKD):  # type: ignore[no-untyped-def]
    needs_x = ctx.needs_input_grad[0]
    if dout_BKD.dtype == torch.float64:  # from a float64 pos; the kernel's sums are float32
        dout_BKD = dout_BKD.float()
    dx, *gradients = patch_embed_bwd(dout_BKD.contiguous(), *ctx.saved_tensors, needs_x)
    return dx if needs_x else None, *gradients, None, None


patch_embed_fwd.register_autograd(_backward, setup_context=_setup_context)
