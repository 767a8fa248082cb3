"""Plain PyTorch, any device and dtype. B samples, L tokens, K kept, N = L - K masked, D width."""

import torch
from torch import Tensor

from ..checks import autocasts


def gather_tokens(x_BLD: Tensor, ids_BK: Tensor) -> Tensor:
    return x_BLD.gather(1, ids_BK[:, :, None].expand(-1, -1, x_BLD.shape[2]))


def merge_tokens(x_BLD: Tensor, computed_BND: Tensor, ids_restore_BL: Tensor) -> Tensor:
    L = x_BLD.shape[1]
    slots = ids_restore_BL - (L - computed_BND.shape[1])
    own = torch.arange(L, device=x_BLD.device)
    return gather_tokens(_one_after_the_other(x_BLD, computed_BND), (slots + L).where(slots >= 0, own))


def unmask_tokens(x_BKD: Tensor, mask_token_11D: Tensor, pos_1LD: Tensor, ids_restore_BL: Tensor) -> Tensor:
    B, K, D = x_BKD.shape
    L = ids_restore_BL.shape[1]
    with_masked = _one_after_the_other(x_BKD, mask_token_11D.expand(B, L - K, D).to(x_BKD.dtype))
    return gather_tokens(with_masked, ids_restore_BL) + pos_1LD.to(x_BKD.dtype)


def _one_after_the_other(x_BLD: Tensor, y_BLD: Tensor) -> Tensor:
    """The tokens of both, which share a dtype. Autocast on a CPU has no ``cat`` for the half type that is not
    its own."""
    if x_BLD.is_cpu and x_BLD.element_size() == 2 and autocasts(x_BLD):
        with torch.autocast("cpu", enabled=False):
            return torch.cat([x_BLD, y_BLD], dim=1)
    return torch.cat([x_BLD, y_BLD], dim=1)
