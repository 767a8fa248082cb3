"""Argument checks and dispatch. F features."""

from torch import Tensor

from .. import checks
from ..backends import uses_csrc, uses_triton
from ..rows import as_before, as_rows
from . import reference
from .registered import bias_gelu_fwd


def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """``gelu(x + bias)`` with the tanh form of GELU.

    ``x`` is [..., F] and ``bias`` is [F], both floating; the result is [..., F]. Only the inputs are saved
    for the backward pass, which recomputes the activation.

    Raises ``ValueError`` for shapes or dtypes that do not fit.
    """
    checks.floating("x", x)
    checks.floating_on("bias", bias, x)
    checks.shape("bias", bias, checks.width("x", x))
    if not (uses_triton(x) or uses_csrc(x, bias)):
        return reference.bias_gelu(x, bias)
    return as_before(bias_gelu_fwd(as_rows(x), bias.contiguous()), x)
