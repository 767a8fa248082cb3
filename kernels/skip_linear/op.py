"""Checks and dispatch. B samples, L tokens, D width, O output width, P numbers of a patch."""

import torch
from torch import Tensor

from .. import checks
from ..linear.op import product
from . import gemm_op, reference


def skip_linear(x: Tensor, skip: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``cat([x, skip], -1) @ weight.T + bias`` without the concatenation.

    ``x``, ``skip`` [..., D]; ``weight`` [O, 2D], its first D columns for ``x``; ``bias`` [O]; one floating
    dtype, or any under autocast, which sets the dtype as it does for a linear layer. Returns [..., O].
    Raises ``ValueError`` for shapes or dtypes that do not fit.
    """
    checks.floating("x", x)
    width = checks.width("x", x)
    checks.shape("skip", skip, *x.shape)
    checks.columns("weight", weight, 2 * width, "O")
    checks.shape("bias", bias, weight.shape[0])
    _check_dtypes(x, skip=skip, weight=weight, bias=bias)
    # Elsewhere there is nothing to gain: a CPU is as fast with three ops, and Inductor fuses the sum itself.
    if not x.is_cuda or torch.compiler.is_compiling() or checks.plain_only():
        return reference.skip_linear(x, skip, weight, bias, product)
    return gemm_op.skip_linear(x, skip, weight, bias)


def patch_skip_linear(
    x_BLD: Tensor,
    patches_BLP: Tensor,
    embed_weight_DP: Tensor,
    embed_bias_D: Tensor,
    pos_1LD: Tensor,
    weight: Tensor,
    bias: Tensor,
) -> Tensor:
    """:func:`skip_linear` where the skip is a patch embedding, by a product of rank P: [B, L, O].

    ``skip = patches @ embed_weight.T + embed_bias + pos`` is never formed: ``patches`` [B, L, P] (P = 16: a
    patch's numbers, in the order of ``embed_weight`` [D, P]), ``embed_bias`` [D], ``pos`` [1, L, D]; ``x``
    [B, L, D], ``weight`` [O, 2D], ``bias`` [O]. The same function up to rounding, with every gradient. Dtypes
    and errors as :func:`skip_linear`.
    """
    checks.floating("x", x_BLD)
    checks.shape("x", x_BLD, "B", "L", "D")
    B, L, D = x_BLD.shape
    checks.shape("patches", patches_BLP, B, L, "P")
    checks.shape("embed_weight", embed_weight_DP, D, patches_BLP.shape[2])
    checks.shape("embed_bias", embed_bias_D, D)
    checks.shape("pos", pos_1LD, 1, L, D)
    checks.columns("weight", weight, 2 * D, "O")
    checks.shape("bias", bias, weight.shape[0])
    _check_dtypes(
        x_BLD, patches=patches_BLP, embed_weight=embed_weight_DP, embed_bias=embed_bias_D, pos=pos_1LD,
        weight=weight, bias=bias,
    )  # fmt: skip
    return reference.patch_skip_linear(
        x_BLD, patches_BLP, embed_weight_DP, embed_bias_D, pos_1LD, weight, bias, product
    )


def _check_dtypes(x: Tensor, **others: Tensor) -> None:
    autocast = checks.autocasts(x)
    for name, other in others.items():
        checks.parameter(name, other, x, autocast)
