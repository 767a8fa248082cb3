"""Checks and dispatch. B images, C channels, S image side, p patch side, L tokens, D width."""

from torch import Tensor

from .. import checks
from . import reference


def patch_embed(x_BCSS: Tensor, weight_DCpp: Tensor, bias_D: Tensor, pos_1LD: Tensor) -> Tensor:
    """Cut images into patches, project them, add the position embedding: -> tokens [B, L, D], row by row.

    ``x`` [B, C, S, S], ``weight`` [D, C, p, p] (a convolution's), ``bias`` [D], ``pos`` [1, L, D] with
    L = (S/p)^2; one floating dtype. Raises ``ValueError`` for shapes or dtypes that do not fit.
    """
    checks.floating("x", x_BCSS)
    checks.floating_on("weight", weight_DCpp, x_BCSS)
    checks.shape("weight", weight_DCpp, "D", "C", "p", weight_DCpp.shape[-1])
    D, C, p, _ = weight_DCpp.shape
    if p < 1:
        raise ValueError(f"weight: shape {list(weight_DCpp.shape)}, a patch has one pixel or more")
    checks.shape("x", x_BCSS, "B", C, "S", x_BCSS.shape[-1])
    S = x_BCSS.shape[-1]
    if S % p:
        raise ValueError(f"x: image side {S} does not divide by the patch side {p}")
    checks.shape("bias", bias_D, D)
    checks.shape("pos", pos_1LD, 1, (S // p) ** 2, D)
    return reference.patch_embed(x_BCSS, weight_DCpp, bias_D, pos_1LD)
