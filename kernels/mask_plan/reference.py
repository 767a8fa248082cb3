"""The mask plan by stable sorting, in plain PyTorch. B samples, L tokens, K kept."""

import torch
from torch import Tensor


def mask_plan(noise_BL: Tensor, len_keep: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """ids_keep [B, K], ids_mask [B, L-K], ids_restore [B, L] (int64), mask [B, L] (float32)."""
    ids_shuffle = torch.argsort(noise_BL, dim=1, stable=True)
    ids_keep, ids_mask = (
        ids.sort(dim=1).values for ids in (ids_shuffle[:, :len_keep], ids_shuffle[:, len_keep:])
    )
    ids_restore = torch.argsort(torch.cat([ids_keep, ids_mask], dim=1), dim=1)
    return ids_keep, ids_mask, ids_restore, (ids_restore >= len_keep).float()
