"""The conditioning of the blocks: times and labels, as the adaLN layers take them. B samples, D width."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UserError
from ..kernels.checks import autocasts
from .blocks import Block
from .ops import takes_activated
from .own import is_plain


@dataclass(frozen=True)
class Conditioning:
    """The conditioning ``plain`` [B, D] and ``activated`` (SiLU). ``modulations``: those already computed,
    [B, 6D] per block and [B, 2D] for the last layer."""

    plain: Tensor
    activated: Tensor
    modulations: Mapping[nn.Module, Tensor] = field(default_factory=dict)

    def of(self, samples: slice) -> "Conditioning":
        """The conditioning of some of the samples."""
        modulations = {block: m[samples] for block, m in self.modulations.items()}
        return Conditioning(self.plain[samples], self.activated[samples], modulations)


def conditioning(c: Tensor, blocks: Sequence[Block], *, batched: bool) -> Conditioning:
    """From embedded times and labels [B, D]; ``batched``: compute all blocks' modulations in one product."""
    activated = F.silu(c)
    if not torch.is_grad_enabled() and autocasts(c) and c.dtype != torch.float64:
        activated = activated.to(torch.get_autocast_dtype(c.device.type))  # once, not for each block
    if not batched or not blocks:
        return Conditioning(c, activated)
    plain = all(takes_activated(block.adaLN_modulation) for block in blocks)
    layers = [block.adaLN_modulation[-1] for block in blocks] if plain else []
    if not layers or not all(map(is_plain, layers)):
        raise UserError("switches: batched_adaln needs plain linear layers (no float8, adapters or hooks)")
    weight, bias = (torch.cat([getattr(layer, name) for layer in layers]) for name in ("weight", "bias"))
    parts = F.linear(activated, weight, bias).chunk(len(layers), dim=1)
    return Conditioning(c, activated, dict(zip(blocks, parts, strict=True)))
