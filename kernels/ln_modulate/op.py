"""Checks and dispatch. B samples, L tokens, D width."""

from torch import Tensor

from .. import checks
from . import reference


def ln_modulate(x_BLD: Tensor, shift_BD: Tensor, scale_BD: Tensor, *, eps: float = 1e-6) -> Tensor:
    """``LN(x) * (1 + scale) + shift``: layer norm without affine parameters, modulated per sample.

    ``x`` [B, L, D], ``shift`` and ``scale`` [B, D], one floating dtype; returns [B, L, D].
    Raises ``ValueError`` for shapes, dtypes or devices that do not fit. Source: DiT (arXiv:2212.09748),
    section 3.2, adaLN-Zero.
    """
    _check(x_BLD, shift=shift_BD, scale=scale_BD)
    return reference.ln_modulate(x_BLD, shift_BD, scale_BD, eps)


def gate_residual_ln_modulate(
    x_BLD: Tensor, y_BLD: Tensor, gate_BD: Tensor, shift_BD: Tensor, scale_BD: Tensor, *, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """The new residual ``r = x + gate * y`` and ``LN(r) * (1 + scale) + shift``, both [B, L, D].

    ``x``, ``y`` [B, L, D]; ``gate``, ``shift``, ``scale`` [B, D]; one floating dtype. Raises
    ``ValueError`` for shapes, dtypes or devices that do not fit.
    """
    _check(x_BLD, gate=gate_BD, shift=shift_BD, scale=scale_BD)
    checks.shape("y", y_BLD, *x_BLD.shape)
    return reference.gate_residual_ln_modulate(x_BLD, y_BLD, gate_BD, shift_BD, scale_BD, eps)


def _check(x_BLD: Tensor, **modulation_BD: Tensor) -> None:
    checks.floating("x", x_BLD)
    checks.shape("x", x_BLD, "B", "L", "D")
    for name, m_BD in modulation_BD.items():
        checks.floating(name, m_BD)
        checks.shape(name, m_BD, x_BLD.shape[0], x_BLD.shape[2])
