"""How a batch's tokens lie in memory. B samples, L tokens of a whole grid, K of them kept, R rows."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..masking import MaskPlan


@dataclass(frozen=True)
class Rows:
    """Tokens [B, K, D], or packed samples of different lengths, [R, D] with ``offsets``.

    ``positions`` [B, K] or [R]: each token's position on the grid, None for whole grids in order;
    ``offsets`` int32 [B + 1]: each sample's first row; ``longest``: an upper bound on a sample's rows.
    """

    positions: Tensor | None = None
    offsets: Tensor | None = None
    longest: int | None = None


WHOLE = Rows()
"""Whole grids, in order."""


def kept(plan: MaskPlan | None) -> Rows:
    """The kept tokens of every sample; all tokens if there is no plan."""
    return WHOLE if plan is None else Rows(plan.ids_keep)


def packed(plan: MaskPlan) -> Rows:
    """All tokens of B samples, followed by the kept tokens of B more."""
    B, L, K, device = plan.batch, plan.num_tokens, plan.len_keep, plan.ids_keep.device
    samples = torch.arange(B + 1, device=device, dtype=torch.int32)
    every = torch.arange(L, device=device).repeat(B)
    return Rows(
        positions=torch.cat([every, plan.ids_keep.flatten()]),
        offsets=torch.cat([samples * L, samples[1:] * K + B * L]),
        longest=L,
    )
