"""Plain PyTorch, any device and dtype. B images, C channels, p patch side, G = S/p, D width."""

import torch.nn.functional as F
from torch import Tensor


def patch_embed(x_BCSS: Tensor, weight_DCpp: Tensor, bias_D: Tensor, pos_1LD: Tensor) -> Tensor:
    # Non-overlapping patches: the convolution is a matrix product over columns (channel, row, column).
    (B, C, S, _), p = x_BCSS.shape, weight_DCpp.shape[2]
    G = S // p
    patches = x_BCSS.reshape(B, C, G, p, G, p).permute(0, 2, 4, 1, 3, 5).reshape(B, G * G, C * p * p)
    return F.linear(patches, weight_DCpp.flatten(1), bias_D) + pos_1LD
