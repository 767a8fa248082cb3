"""Plain PyTorch, any device and dtype. B images, C channels, p patch side, G = S/p, L tokens, D width."""

import torch.nn.functional as F
from torch import Tensor


def patchify(x_BCSS: Tensor, p: int) -> Tensor:
    """Patches [B, L, C * p * p], each in the order channel, row, column."""
    B, C, S, _ = x_BCSS.shape
    G = S // p
    patches = x_BCSS.reshape(B, C, G, p, G, p).permute(0, 2, 4, 1, 3, 5)
    return patches.reshape(B, G * G, C * p * p)


def patch_embed(
    x_BCSS: Tensor, weight_DCpp: Tensor, bias_D: Tensor, pos_1LD: Tensor, ids_BK: Tensor | None = None
) -> Tensor:
    # Non-overlapping patches: the convolution is a matrix product over columns (channel, row, column).
    patches = patchify(x_BCSS, weight_DCpp.shape[2])
    if ids_BK is None:
        return F.linear(patches, weight_DCpp.flatten(1), bias_D) + pos_1LD
    ids_BK1 = ids_BK[:, :, None]
    chosen = patches.gather(1, ids_BK1.expand(-1, -1, patches.shape[2]))
    pos = pos_1LD.expand(len(x_BCSS), -1, -1).gather(1, ids_BK1.expand(-1, -1, pos_1LD.shape[2]))
    return F.linear(chosen, weight_DCpp.flatten(1), bias_D) + pos
