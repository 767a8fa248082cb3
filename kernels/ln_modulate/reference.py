"""Plain PyTorch, any device and dtype. B samples, L tokens, R rows (tokens of all samples), D width."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import cast


def per_row(m_BD: Tensor, offsets: Tensor | None, rows: int) -> Tensor:
    """A modulation in a shape that broadcasts over the rows: [B, 1, D], or [R, D] for a ragged batch."""
    if offsets is None:
        return m_BD[:, None]
    return m_BD.index_select(0, samples_of(offsets, rows))


def samples_of(offsets: Tensor, rows: int) -> Tensor:
    """The index of each row's sample; within range even for unchecked ``offsets``."""
    row = torch.arange(rows, device=offsets.device, dtype=offsets.dtype)
    return torch.bucketize(row, offsets[1:].contiguous(), right=True).clamp_max(max(len(offsets) - 2, 0))


def ln_modulate(x: Tensor, shift_BD: Tensor, scale_BD: Tensor, offsets: Tensor | None, eps: float) -> Tensor:
    R, normal = x.shape[0], F.layer_norm(x, x.shape[-1:], eps=eps)
    out = torch.addcmul(per_row(shift_BD, offsets, R), normal, 1 + per_row(scale_BD, offsets, R))
    return cast(out, x.dtype)


def gate_residual_ln_modulate(
    x: Tensor,
    y: Tensor,
    gate_BD: Tensor,
    shift_BD: Tensor,
    scale_BD: Tensor,
    offsets: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    residual = gate_residual(x, y, gate_BD, offsets)
    return residual, ln_modulate(residual, shift_BD, scale_BD, offsets, eps)


def gate_residual(x: Tensor, y: Tensor, gate_BD: Tensor, offsets: Tensor | None) -> Tensor:
    return cast(torch.addcmul(x, per_row(gate_BD, offsets, x.shape[0]), y), x.dtype)


def forward(
    x_RD: Tensor,
    y_RD: Tensor | None,
    gate_BD: Tensor | None,
    shift_BD: Tensor,
    scale_BD: Tensor,
    offsets: Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Residual (``x`` itself if there is no ``y``), modulated norm in ``dtype``, mean and 1/std [R, 1]."""
    rows = _Rows(x_RD, scale_BD, offsets)
    r_RD = x_RD
    if y_RD is not None and gate_BD is not None:
        r_RD = rows.residual(x_RD, y_RD, gate_BD)
    normal, mean, rstd = torch.native_layer_norm(r_RD, r_RD.shape[1:], None, None, eps)
    out = torch.addcmul(rows.of(shift_BD), normal, 1 + rows.of(scale_BD))
    return r_RD, out.to(dtype), mean, rstd


def backward(
    x_RD: Tensor,
    y_RD: Tensor | None,
    gate_BD: Tensor | None,
    shift_BD: Tensor,
    scale_BD: Tensor,
    offsets: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    dresidual_RD: Tensor | None,
    dout_RD: Tensor,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor, Tensor, Tensor]:
    """Gradients of x, y, gate, shift and scale, and the forward pass's output again."""
    rows, r_RD = _Rows(x_RD, scale_BD, offsets), x_RD
    if y_RD is not None and gate_BD is not None:
        r_RD = rows.residual(x_RD, y_RD, gate_BD)
    normal, dout, scale = (r_RD - mean) * rstd, dout_RD.to(r_RD.dtype), 1 + rows.of(scale_BD)
    out = torch.addcmul(rows.of(shift_BD), normal, scale).to(dout_RD.dtype)
    dshift, dscale = rows.sum(dout, shift_BD), rows.sum(dout * normal, scale_BD)
    mask = [True, False, False]
    dr = torch.ops.aten.native_layer_norm_backward(
        dout * scale, r_RD, r_RD.shape[1:], mean, rstd, None, None, mask
    )[0]
    if dresidual_RD is not None:
        dr = dr + dresidual_RD
    if y_RD is None or gate_BD is None:
        return dr, None, None, dshift, dscale, out
    dgate = rows.sum(dr * y_RD, gate_BD)
    return dr, (dr * rows.of(gate_BD)).to(y_RD.dtype), dgate, dshift, dscale, out


class _Rows:
    """Expand modulations to rows, and sum over each sample's rows."""

    def __init__(self, x_RD: Tensor, m_BD: Tensor, offsets: Tensor | None):
        self.R, self.B, self.dtype = x_RD.shape[0], m_BD.shape[0], x_RD.dtype
        self.offsets = offsets

    def of(self, m_BD: Tensor) -> Tensor:
        """[R, D] in the dtype of x."""
        m_BD = m_BD.to(self.dtype)
        if self.offsets is None:
            return m_BD[:, None].expand(-1, self.R // max(self.B, 1), -1).reshape(self.R, m_BD.shape[1])
        return per_row(m_BD, self.offsets, self.R)

    def residual(self, x_RD: Tensor, y_RD: Tensor, gate_BD: Tensor) -> Tensor:
        return torch.addcmul(x_RD, self.of(gate_BD), y_RD.to(x_RD.dtype))

    def sum(self, x_RD: Tensor, like_BD: Tensor) -> Tensor:
        """[B, D] in the dtype of ``like``."""
        if self.offsets is None:
            L = self.R // max(self.B, 1)
            return x_RD.view(self.B, L, x_RD.shape[1]).sum(1).to(like_BD.dtype)
        samples = samples_of(self.offsets, self.R)
        total = x_RD.new_zeros(self.B, x_RD.shape[1])
        return total.index_add_(0, samples, x_RD).to(like_BD.dtype)
