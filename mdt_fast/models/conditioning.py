"""What conditions the blocks: times and labels, as every adaLN layer reads them. B samples, D width."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import UserError
from .blocks import Block
from .ops import is_plain

FINAL = -1
"""The last layer's key among the modulations."""


@dataclass(frozen=True)
class Conditioning:
    """``c`` [B, D], activated (SiLU); ``modulations`` [B, 6D] of those blocks, by index, that have been
    computed already, and [B, 2D] of the last layer."""

    c: Tensor
    modulations: Mapping[int, Tensor] = field(default_factory=dict)

    def of(self, samples: slice) -> "Conditioning":
        """For some samples."""
        return Conditioning(self.c[samples], {i: m[samples] for i, m in self.modulations.items()})


def conditioning(c: Tensor, blocks: Sequence[Block], *, batched: bool) -> Conditioning:
    """From times and labels, embedded [B, D]; ``batched``: all blocks' modulations by one product."""
    c = F.silu(c)
    if not batched or not blocks:
        return Conditioning(c)
    layers = [block.adaLN_modulation[1] for block in blocks]
    if not all(map(is_plain, layers)):
        raise UserError("switches: batched_adaln needs plain linear layers (no float8, adapters or hooks)")
    weight, bias = (torch.cat([getattr(layer, name) for layer in layers]) for name in ("weight", "bias"))
    parts = F.linear(c, weight, bias).chunk(len(layers), dim=1)
    return Conditioning(c, {block.index: part for block, part in zip(blocks, parts, strict=True)})
