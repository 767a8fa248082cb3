"""The transformer block and the last layer, on the kernel rooms.

x [B, L, D], or packed rows [R, D] (see ``rows.py``); B samples, L tokens, D width, P numbers of a patch.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from ..config import Switches
from ..kernels import gather_tokens, gelu_linear, merge_tokens, patch_skip_linear, skip_linear
from ..kernels.linear.op import gelu_epilogue
from ..masking import MaskPlan
from ..reference.layers import unpatchify
from .attention import Attention
from .checkpointing import checkpointed
from .ops import (
    apply_linear,
    gated,
    gated_norm_linear,
    in_float8,
    is_itself,
    is_plain,
    modulation_from,
    norm_linear,
    residual_norm_linear,
)
from .rows import WHOLE, Rows


class Embedded(NamedTuple):
    """The embedded input, not spelt out: patches [B, L, P], and what makes tokens of them."""

    patches: Tensor
    weight: Tensor
    bias: Tensor
    pos_embed: Tensor


Skip = Tensor | Embedded | None
"""The embedded input [B, L, D] that MDTv2's decoder mixes in; the other models have none."""


def both_skips(full: Skip, masked: Skip) -> Skip:
    """For the samples of both passes, one after the other."""
    if isinstance(full, Embedded) and isinstance(masked, Embedded):
        return full._replace(patches=torch.cat([full.patches, masked.patches]))
    if isinstance(full, Tensor) and isinstance(masked, Tensor):
        return torch.cat([full, masked])
    return None


class Mlp(nn.Module):
    """Linear, bias and GELU (tanh form), linear. The block runs the first one, behind its norm."""

    def __init__(self, hidden_size: int, mlp_ratio: float) -> None:
        super().__init__()
        self.switches = Switches()
        self.fc1 = nn.Linear(hidden_size, int(hidden_size * mlp_ratio))
        self.fc2 = nn.Linear(int(hidden_size * mlp_ratio), hidden_size)

    @property
    def fused(self) -> bool:
        """Whether :meth:`forward` adds the first layer's bias."""
        return self.switches.fused_mlp and is_plain(self.fc1) and is_plain(self.fc2)

    def takes_gelu(self, x: Tensor) -> bool:
        """Whether the first layer's product is to have GELU as its epilogue, with nothing but ``fc2`` left to
        do. Not where something looks at what :meth:`forward` is given, or stands in its place."""
        if torch.is_grad_enabled():  # the backward pass needs what was before it
            return False
        fused = self.fused and type(self) is Mlp and in_float8(self.fc1) is False
        if not (fused and gelu_epilogue(x, self.fc1.weight)):
            return False
        return not (self._forward_hooks or self._forward_pre_hooks or "forward" in vars(self))

    def forward(self, hidden: Tensor) -> Tensor:
        """From what the first layer gave, with its bias unless ``fused``."""
        if self.fused:
            weight, bias = self.fc2.weight, self.fc2.bias
            recompute, float8 = self.switches.recompute, in_float8(self.fc2)
            return gelu_linear(hidden, self.fc1.bias, weight, bias, recompute=recompute, float8=float8)
        return self.fc2(F.gelu(hidden, approximate="tanh"))


class Block(nn.Module):
    """A transformer block with adaLN-Zero conditioning, and in MDTv2 a long skip on entry."""

    def __init__(
        self, hidden_size: int, num_heads: int, mlp_ratio: float, grid_size: int | None, skip: bool = False
    ) -> None:
        super().__init__()
        self.switches, self.checkpointing = Switches(), "none"
        self.attn = Attention(hidden_size, num_heads, grid_size)
        self.mlp = Mlp(hidden_size, mlp_ratio)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))
        self.skip_linear = nn.Linear(2 * hidden_size, hidden_size) if skip else None

    def forward(
        self,
        x: Tensor,
        c: Tensor,
        rows: Rows = WHOLE,
        skip: Tensor | Embedded | None = None,
        masked: MaskPlan | None = None,
        modulation: Tensor | None = None,
    ) -> Tensor:
        """x and conditioning c [B, D], activated (SiLU) if ``adaLN_modulation`` takes that -> like x.

        ``skip``: like x, or the embedded input. ``masked``: only the masked tokens of whole grids x [B, L, D]
        are computed, the others stay. ``modulation`` [B, 6D]: this block's, if it is known already.
        """
        if self.checkpointing == "none" or not torch.is_grad_enabled():
            return self.compute(x, c, rows, skip, masked, modulation)
        return checkpointed(self, self.compute, self.checkpointing, x, c, rows, skip, masked, modulation)

    def compute(
        self,
        x: Tensor,
        c: Tensor,
        rows: Rows,
        skip: Tensor | Embedded | None,
        masked: MaskPlan | None,
        modulation: Tensor | None,
    ) -> Tensor:
        """:meth:`forward`, without gradient checkpointing."""
        if skip is not None and self.skip_linear is not None:
            x = self.mix(x, skip, self.skip_linear)
        if modulation is None:
            modulation = modulation_from(self.adaLN_modulation, c)
        attn, mlp = self.attn, self.mlp  # looked up once: a module's attributes take the host long
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation.chunk(6, dim=1)
        fused, recompute = self.switches.fused_adaln, self.switches.recompute
        how: dict[str, Any] = {"offsets": rows.offsets, "fused": fused, "recompute": recompute}
        whole, qkv = x, attn.qkv
        if masked is None:
            x, hidden = residual_norm_linear(x, shift_a, scale_a, qkv, **how)
            attended = attn(hidden, rows)
        else:
            x, D = gather_tokens(whole, masked.ids_mask), x.shape[-1]
            q = norm_linear(x, shift_a, scale_a, qkv, **how, outputs=slice(0, D))
            kv = norm_linear(whole, shift_a, scale_a, qkv, **how, outputs=slice(D, 3 * D))
            attended = attn.chosen(q, kv, masked.ids_mask)
        if isinstance(mlp, Mlp):
            gelu = mlp.takes_gelu(x)
            how |= {"with_bias": gelu or not mlp.fused, "gelu": gelu}
            x, hidden = gated_norm_linear(x, attended, gate_a, shift_m, scale_m, mlp.fc1, **how)
            y = apply_linear(mlp.fc2, hidden) if gelu else mlp(hidden)
        else:  # one of the user's own, which takes tokens
            x, y = gated_norm_linear(x, attended, gate_a, shift_m, scale_m, mlp, **how)
        x = gated(x, y, gate_m, offsets=rows.offsets, fused=fused)
        return x if masked is None else merge_tokens(whole, x, masked.ids_restore)

    def mix(self, x: Tensor, skip: Tensor | Embedded, layer: nn.Linear) -> Tensor:
        """``layer`` on x and skip, side by side."""
        if isinstance(skip, Embedded):
            return patch_skip_linear(x, *skip, layer.weight, layer.bias)
        if is_plain(layer):
            return skip_linear(x, skip, layer.weight, layer.bias)
        return layer(torch.cat([x, skip], dim=-1))


def chooses_tokens(block: nn.Module) -> bool:
    """Whether ``block`` may be run for some tokens alone: not where something (but FSDP, which changes no
    numbers) looks at it or at the attention of all, or stands in its place."""
    hooked = block._forward_hooks or block._forward_pre_hooks
    if not isinstance(block, Block) or (hooked and not isinstance(block, FSDPModule)):
        return False
    return is_itself(block.attn, Attention) and is_plain(block.attn.qkv)


class FinalLayer(nn.Module):
    """Tokens [B, L, D] and conditioning [B, D], activated (SiLU) if ``adaLN_modulation`` takes that, to
    patches [B, L, p*p*O]."""

    def __init__(self, hidden_size: int, patch_size: int, out_channels: int) -> None:
        super().__init__()
        self.switches = Switches()
        self.linear = nn.Linear(hidden_size, patch_size * patch_size * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, x: Tensor, c: Tensor, modulation: Tensor | None = None) -> Tensor:
        """``modulation`` [B, 2D]: this layer's, if it is known already."""
        if modulation is None:
            modulation = modulation_from(self.adaLN_modulation, c)
        shift, scale = modulation.chunk(2, dim=1)
        fused, recompute = self.switches.fused_adaln, self.switches.recompute
        return norm_linear(x, shift, scale, self.linear, offsets=None, fused=fused, recompute=recompute)


__all__ = ["Block", "Embedded", "FinalLayer", "Mlp", "Skip", "both_skips", "unpatchify"]
