"""Plain PyTorch, any device and dtype. B samples, L tokens, D width."""

import torch
import torch.nn.functional as F
from torch import Tensor


def ln_modulate(x_BLD: Tensor, shift_BD: Tensor, scale_BD: Tensor, eps: float) -> Tensor:
    # 1 + scale would lose scale's low bits (or make NaN of nothing) in a half type: it is never formed there.
    normal = F.layer_norm(x_BLD, x_BLD.shape[-1:], eps=eps)
    return torch.addcmul(shift_BD[:, None] + normal, normal, scale_BD[:, None])


def gate_residual_ln_modulate(
    x_BLD: Tensor, y_BLD: Tensor, gate_BD: Tensor, shift_BD: Tensor, scale_BD: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    residual = torch.addcmul(x_BLD, gate_BD[:, None], y_BLD)
    return residual, ln_modulate(residual, shift_BD, scale_BD, eps)
