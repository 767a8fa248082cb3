"""Argument checks and dispatch. B samples, L tokens, D width, O output width, P numbers per patch."""

import torch
from torch import Tensor

from .. import checks
from ..linear.op import product
from . import gemm_op, reference


def skip_linear(x: Tensor, skip: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``cat([x, skip], -1) @ weight.T + bias`` without the concatenation.

    ``x`` and ``skip`` are [..., D], ``weight`` is [O, 2D] with its first D columns for ``x``, ``bias`` is
    [O], and the result is [..., O]. All share one floating dtype; under autocast they may have any, and
    autocast sets the dtype as it does for a linear layer.

    Raises ``ValueError`` for shapes or dtypes that do not fit.
    """
    checks.floating("x", x)
    width = checks.width("x", x)
    checks.shape("skip", skip, *x.shape)
    checks.columns("weight", weight, 2 * width, "O")
    checks.shape("bias", bias, weight.shape[0])
    _check_dtypes(x, skip=skip, weight=weight, bias=bias)
    # Elsewhere nothing is gained: a CPU is as fast with three ops, and Inductor fuses the sum by itself.
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
    """:func:`skip_linear` for a skip that is a patch embedding, as a product of rank P; returns [B, L, O].

    ``skip = patches @ embed_weight.T + embed_bias + pos`` is never formed. ``patches`` [B, L, P] holds the P
    numbers of each patch (for example P = 16) in the order of ``embed_weight`` [D, P]; ``embed_bias`` is [D]
    and ``pos`` is [1, L, D]. ``x`` is [B, L, D], ``weight`` [O, 2D] and ``bias`` [O]. The result equals that
    of :func:`skip_linear` up to rounding, and every argument has a gradient. Dtypes and errors are as for
    :func:`skip_linear`.
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
