"""Argument checks and dispatch.

B images, C channels, S image side, p patch side, L tokens, K selected tokens, D width.
"""

import torch
from torch import Tensor

from .. import checks
from ..backends import uses_triton
from . import reference


def patch_embed(
    x_BCSS: Tensor, weight_DCpp: Tensor, bias_D: Tensor, pos_1LD: Tensor, ids_BK: Tensor | None = None
) -> Tensor:
    """Cut images into patches, project them and add the position embedding; returns tokens [B, L, D].

    ``x`` is [B, C, S, S], ``weight`` is a convolution's [D, C, p, p], ``bias`` is [D] and ``pos`` is
    [1, L, D] with L = (S/p)^2. The tokens are in row-major order of the patches. With ``ids`` (int64 [B, K],
    0..L-1, repeats allowed) only those tokens are computed, and the result is [B, K, D].

    ``x``, ``weight`` and ``bias`` share one floating dtype; under autocast they may have any and are cast as
    for a linear layer. The result has that dtype or the dtype of ``pos``, whichever is wider.

    Raises ``ValueError`` for shapes or dtypes that do not fit, and on the CPU for ids out of range.
    """
    checks.floating("x", x_BCSS)
    checks.tensor("weight", weight_DCpp)
    checks.shape("weight", weight_DCpp, "D", "C", "p", weight_DCpp.shape[-1] if weight_DCpp.ndim else "p")
    D, C, p, other = weight_DCpp.shape
    if p < 1 or p != other:
        raise ValueError(f"weight: shape {list(weight_DCpp.shape)}, a patch is square, of one pixel or more")
    checks.shape("x", x_BCSS, "B", C, "S", x_BCSS.shape[-1] if x_BCSS.ndim else "S")
    if x_BCSS.shape[2] != x_BCSS.shape[3]:
        raise ValueError(f"x: shape {list(x_BCSS.shape)}, images must be square")
    B, S = x_BCSS.shape[0], x_BCSS.shape[-1]
    if S % p:
        raise ValueError(f"x: image side {S} does not divide by the patch side {p}")
    checks.shape("bias", bias_D, D)
    checks.shape("pos", pos_1LD, 1, (S // p) ** 2, D)
    autocast = checks.autocasts(x_BCSS)
    checks.parameter("weight", weight_DCpp, x_BCSS, autocast)
    checks.parameter("bias", bias_D, x_BCSS, autocast)
    checks.floating_on("pos", pos_1LD, x_BCSS)
    if ids_BK is not None:
        checks.shape("ids", ids_BK, B, "K")
        checks.token_ids("ids", ids_BK, (S // p) ** 2, x_BCSS)
    if not uses_triton(x_BCSS):
        return reference.patch_embed(x_BCSS, weight_DCpp, bias_D, pos_1LD, ids_BK)
    from .triton_op import patch_embed_fwd  # not at the top: not every machine has Triton

    dtype = torch.get_autocast_dtype(x_BCSS.device.type) if autocast else x_BCSS.dtype
    x, weight, bias = (tensor.to(dtype).contiguous() for tensor in (x_BCSS, weight_DCpp, bias_D))
    ids = None if ids_BK is None else ids_BK.contiguous()
    return patch_embed_fwd(
        x, weight, bias, pos_1LD.contiguous(), ids, torch.promote_types(dtype, pos_1LD.dtype)
    )
