"""Plain PyTorch, any device and dtype. B samples, L tokens, R rows of ragged samples, D width."""

import torch
import torch.nn.functional as F
from torch import Tensor


def per_row(m_BD: Tensor, offsets: Tensor | None) -> Tensor:
    """A modulation in a shape that broadcasts over the rows: [B, 1, D], or [R, D] for ragged samples."""
    return m_BD[:, None] if offsets is None else m_BD.repeat_interleave(offsets.diff(), dim=0)


def ln_modulate(x: Tensor, shift_BD: Tensor, scale_BD: Tensor, offsets: Tensor | None, eps: float) -> Tensor:
    normal = F.layer_norm(x, x.shape[-1:], eps=eps)
    return torch.addcmul(per_row(shift_BD, offsets), normal, 1 + per_row(scale_BD, offsets))


def gate_residual_ln_modulate(
    x: Tensor,
    y: Tensor,
    gate_BD: Tensor,
    shift_BD: Tensor,
    scale_BD: Tensor,
    offsets: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    residual = torch.addcmul(x, per_row(gate_BD, offsets), y)
    return residual, ln_modulate(residual, shift_BD, scale_BD, offsets, eps)
