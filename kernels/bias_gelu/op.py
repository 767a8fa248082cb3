"""Checks and dispatch. F features."""

from torch import Tensor

from .. import checks
from . import reference


def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """``gelu(x + bias)`` in its tanh form: ``x`` [..., F], ``bias`` [F], floating; returns [..., F].

    Raises ``ValueError`` for shapes or dtypes that do not fit.
    """
    checks.floating("x", x)
    checks.floating("bias", bias)
    checks.shape("bias", bias, x.shape[-1] if x.ndim else "F")
    return reference.bias_gelu(x, bias)
