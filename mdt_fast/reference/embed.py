"""Embeddings of patches, positions, timesteps and labels.

B batch, L tokens, D width, G tokens along one side (L = G*G), C channels.
"""

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

FREQUENCIES = 256
"""Width of a timestep's sinusoid, the input of its MLP."""


def sincos_position_table(hidden_size: int, grid_size: int, extra_tokens: int = 0) -> Tensor:
    """The fixed 2-D sine-cosine table [L, D], float64; ``hidden_size`` must be a multiple of 4.

    ``extra_tokens`` rows of zeros come before it (for a class token, say).

    With ``w_k = 10000^(-k/(D/4))`` and ``e(u) = [sin(u w_k).., cos(u w_k)..]``, the row of the token at
    (row, column) is ``[e(column), e(row)]``: the first half of the channels encodes the column.
    """
    table = sincos_of_positions(hidden_size, np.arange(grid_size, dtype=np.float64))
    return torch.from_numpy(np.concatenate([np.zeros((extra_tokens, hidden_size)), table]))


def sincos_of_positions(hidden_size: int, positions: np.ndarray) -> np.ndarray:
    """The same table [G*G, D] for a square grid with rows and columns at ``positions`` [G] (float64)."""
    # numpy's pow, sin and cos: torch's differ in the last bit of float64.
    frequencies = 1.0 / 10000 ** (np.arange(hidden_size // 4, dtype=np.float64) / (hidden_size / 4.0))
    angles = positions[:, None] * frequencies
    e = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)  # [G, D/2]
    return np.concatenate([np.tile(e, (len(e), 1)), np.repeat(e, len(e), axis=0)], axis=1)


def timestep_embedding(t: Tensor, dim: int = FREQUENCIES, max_period: float = 10000.0) -> Tensor:
    """Sinusoid [B, dim] of timesteps [B] (fractions allowed), always computed in float32, cosines first."""
    angles = t[:, None].float() * frequencies(dim // 2, max_period, t.device)
    return F.pad(torch.cat([angles.cos(), angles.sin()], dim=-1), (0, dim % 2))


def frequencies(number: int, max_period: float, device: torch.device) -> Tensor:
    """Frequencies from 1 down to nearly 1 / ``max_period``, float32 [number]. The last bit depends on
    PyTorch's ``exp``, which differs between kinds of processor."""
    return torch.exp(
        -math.log(max_period) * torch.arange(number, dtype=torch.float32, device=device) / number
    )


class PatchEmbed(nn.Module):
    """Embed images [B, C, S, S] as tokens [B, L, D], row by row."""

    def __init__(self, patch_size: int, in_channels: int, hidden_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, hidden_size, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class TimestepEmbedder(nn.Module):
    """Embed timesteps [B] as [B, D]: sinusoid, linear, SiLU, linear."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(FREQUENCIES, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
        )

    def forward(self, t: Tensor) -> Tensor:
        weight: Any = next(self.mlp.parameters(), None)
        # FSDP1 and DataParallel keep plain tensors in the parameters' place; quantised layers have neither.
        if weight is None:
            weight = getattr(next(self.mlp.children(), None), "weight", None)
        dtype = weight.dtype if isinstance(weight, Tensor) else torch.get_default_dtype()
        return self.mlp(timestep_embedding(t).to(dtype))


class LabelEmbedder(nn.Module):
    """Embed labels [B] as [B, D], dropping some of them in training for classifier-free guidance.

    With ``dropout_prob`` > 0 the table has one row more than classes: the null class, index ``num_classes``.
    """

    def __init__(self, num_classes: int, hidden_size: int, dropout_prob: float) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + (dropout_prob > 0), hidden_size)
        self.num_classes = num_classes
        self.dropout_prob = dropout_prob

    def drop(self, labels: Tensor, force_drop_ids: Tensor | None = None) -> Tensor:
        """:meth:`token_drop`."""
        return self.token_drop(labels, force_drop_ids)

    def token_drop(self, labels: Tensor, force_drop_ids: Tensor | None = None) -> Tensor:
        """Labels, the dropped ones replaced by the null class; ``force_drop_ids`` [B]: drop where it is 1."""
        if force_drop_ids is None:
            # From the CPU's generator on any device, as in the official model.
            dropped = torch.rand(labels.shape[0], dtype=torch.float32, device="cpu") < self.dropout_prob
        else:
            dropped = force_drop_ids == 1
        return torch.where(dropped.to(labels.device, non_blocking=True), self.num_classes, labels)

    def forward(self, labels: Tensor, train: bool, force_drop_ids: Tensor | None = None) -> Tensor:
        if (train and self.dropout_prob > 0) or force_drop_ids is not None:
            labels = self.drop(labels, force_drop_ids)
        return self.embedding_table(labels)
