"""Argument checks and dispatch. B samples, L tokens, R rows (tokens of all samples), D width."""

from torch import Tensor

from .. import checks
from ..backends import uses_csrc, uses_triton
from ..rows import as_before, as_rows
from . import reference
from .config import MAX_D
from .registered import gate_residual_fwd, ln_modulate_fwd


def ln_modulate(
    x_BLD: Tensor, shift_BD: Tensor, scale_BD: Tensor, *, offsets: Tensor | None = None, eps: float = 1e-6
) -> Tensor:
    """``LN(x) * (1 + scale) + shift``: layer norm without affine parameters, modulated per sample.

    ``x`` is [B, L, D], ``shift`` and ``scale`` are [B, D], all floating; the result is [B, L, D]. For a
    ragged batch, ``x`` and the result are packed [R, D], and ``offsets`` are cumulative sequence lengths
    (cu_seqlens), int32 [B + 1], ascending from 0 to R. On CUDA, D is at most 8192.

    Raises ``ValueError`` for arguments that do not fit.
    Source: DiT (arXiv:2212.09748), section 3.2, adaLN-Zero.
    """
    check(x_BLD, offsets, shift=shift_BD, scale=scale_BD)
    eps = checks.eps(eps)
    if not serves(x_BLD, shift_BD, scale_BD):
        return reference.ln_modulate(x_BLD, shift_BD, scale_BD, offsets, eps)
    return _kernel(x_BLD, None, None, shift_BD, scale_BD, offsets, eps)[1]


def gate_residual_ln_modulate(
    x_BLD: Tensor,
    y_BLD: Tensor,
    gate_BD: Tensor,
    shift_BD: Tensor,
    scale_BD: Tensor,
    *,
    offsets: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """The new residual ``r = x + gate * y`` and ``LN(r) * (1 + scale) + shift``, both shaped as ``x``.

    ``x`` and ``y`` are [B, L, D], or packed [R, D] with cumulative ``offsets`` (see :func:`ln_modulate`).
    ``gate``, ``shift`` and ``scale`` are [B, D]. All are floating, and the results have the dtype of ``x``.
    Raises ``ValueError`` for arguments that do not fit.
    """
    check(x_BLD, offsets, gate=gate_BD, shift=shift_BD, scale=scale_BD)
    eps = checks.eps(eps)
    checks.shape("y", y_BLD, *x_BLD.shape)
    checks.floating_on("y", y_BLD, x_BLD)
    if not serves(x_BLD, y_BLD, gate_BD, shift_BD, scale_BD):
        return reference.gate_residual_ln_modulate(x_BLD, y_BLD, gate_BD, shift_BD, scale_BD, offsets, eps)
    return _kernel(x_BLD, y_BLD, gate_BD, shift_BD, scale_BD, offsets, eps)


def gate_residual(x_BLD: Tensor, y_BLD: Tensor, gate_BD: Tensor, *, offsets: Tensor | None = None) -> Tensor:
    """``x + gate * y``, in the shape and dtype of ``x``.

    ``x`` and ``y`` are [B, L, D], or packed [R, D] with cumulative ``offsets`` (see :func:`ln_modulate`);
    ``gate`` is [B, D]. All are floating. Raises ``ValueError`` for arguments that do not fit.
    """
    check(x_BLD, offsets, gate=gate_BD)
    checks.shape("y", y_BLD, *x_BLD.shape)
    checks.floating_on("y", y_BLD, x_BLD)
    if not serves(x_BLD, y_BLD, gate_BD):
        return reference.gate_residual(x_BLD, y_BLD, gate_BD, offsets)
    rows = gate_residual_fwd(as_rows(x_BLD), as_rows(y_BLD), columns_together(gate_BD), offsets)
    return as_before(rows, x_BLD)


def _kernel(
    x: Tensor,
    y: Tensor | None,
    gate: Tensor | None,
    shift: Tensor,
    scale: Tensor,
    offsets: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    y_RD = None if y is None else as_rows(y)
    # A modulation is one sixth of the columns of a wider tensor: its row stride is free, columns contiguous.
    gate = None if gate is None else columns_together(gate)
    residual_RD, out_RD, _, _ = ln_modulate_fwd(
        as_rows(x),
        y_RD,
        gate,
        columns_together(shift),
        columns_together(scale),
        offsets,
        eps,
        x.dtype,
    )
    return as_before(residual_RD, x) if y is not None else x, as_before(out_RD, x)


def serves(x: Tensor, *others: Tensor | None) -> bool:
    """Whether a kernel serves these tensors, Triton's or the CPU's; ``ValueError`` if D is too wide for
    Triton's."""
    if not uses_triton(x):
        return uses_csrc(x, *others)
    if x.shape[-1] > MAX_D:
        raise ValueError(f"x: width {x.shape[-1]}, the Triton kernel takes at most {MAX_D}")
    return True


def columns_together(m_BD: Tensor) -> Tensor:
    return m_BD if m_BD.stride(-1) == 1 else m_BD.contiguous()


def check(x: Tensor, offsets: Tensor | None, **modulation_BD: Tensor) -> None:
    checks.floating("x", x)
    batch: int | str = "B"
    if offsets is None:
        if x.ndim != 3:
            checks.shape("x", x, "B", "L", "D")
        batch = x.shape[0]
    else:
        if x.ndim != 2:
            checks.shape("x", x, "R", "D")
        checks.offsets("offsets", offsets, x)
        batch = offsets.shape[0] - 1
    if x.shape[-1] == 0:
        raise ValueError("x: width 0, expected 1 or more")
    for name, m_BD in modulation_BD.items():
        checks.shape(name, m_BD, batch, x.shape[-1])
        checks.floating_on(name, m_BD, x)
