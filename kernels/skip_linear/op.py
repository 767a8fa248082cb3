"""Checks and dispatch. B samples, L tokens, D width."""

from torch import Tensor

from .. import checks
from . import reference


def skip_linear(x: Tensor, skip: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``cat([x, skip], -1) @ weight.T + bias`` without the concatenation.

    ``x``, ``skip`` [B, L, D]; ``weight`` [O, 2D], its first D columns for ``x``; ``bias`` [O]; one floating
    dtype. Returns [B, L, O]. Raises ``ValueError`` for shapes or dtypes that do not fit.
    """
    checks.floating("x", x)
    checks.shape("x", x, "B", "L", "D")
    checks.shape("skip", skip, *x.shape)
    for name, other in (("skip", skip), ("weight", weight), ("bias", bias)):
        checks.floating_on(name, other, x)
    checks.shape("weight", weight, "O", 2 * x.shape[2])
    checks.shape("bias", bias, weight.shape[0])
    return reference.skip_linear(x, skip, weight, bias)
