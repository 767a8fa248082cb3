"""The transformer block and the last layer, built on ``mdt_fast.kernels``.

x [B, L, D], or packed rows [R, D] (see ``rows.py``); B samples, L tokens, D width, P values per patch.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from ..config import Switches
from ..kernels import gather_tokens, gelu_linear, linear, merge_tokens, patch_skip_linear, skip_linear
from ..kernels.linear.op import gelu_epilogue
from ..masking import MaskPlan
from ..reference.layers import unpatchify
from .absent import WithoutOfficialParts
from .attention import Attention, attend
from .checkpointing import checkpointed
from .ops import (
    apply_linear,
    gated,
    gated_norm_linear,
    in_float8,
    modulation_from,
    norm,
    norm_linear,
    residual_norm_linear,
)
from .own import is_itself, is_plain, known, takes_ours
from .rows import WHOLE, Rows


class Embedded(NamedTuple):
    """The embedded input in factored form: patches [B, L, P], and the parameters that make tokens of them."""

    patches: Tensor
    weight: Tensor
    bias: Tensor
    pos_embed: Tensor


Skip = Tensor | Embedded | None
"""The embedded input [B, L, D] that MDTv2's decoder mixes in; the other models have none."""


def both_skips(full: Skip, masked: Skip) -> Skip:
    """Concatenate the skips of both passes along the samples."""
    if isinstance(full, Embedded) and isinstance(masked, Embedded):
        return full._replace(patches=torch.cat([full.patches, masked.patches]))
    if isinstance(full, Tensor) and isinstance(masked, Tensor):
        return torch.cat([full, masked])
    return None


@known
class Mlp(WithoutOfficialParts):
    """Linear, GELU (tanh form), linear, for tokens [..., D]. Unless something replaces or observes it, the
    block fuses its norm with the first layer, and calls :meth:`after_fc1`."""

    absent = "act", "drop", "drop1", "drop2", "norm"

    def __init__(self, hidden_size: int, mlp_ratio: float) -> None:
        super().__init__()
        self.switches = Switches()
        self.fc1 = nn.Linear(hidden_size, int(hidden_size * mlp_ratio))
        self.fc2 = nn.Linear(int(hidden_size * mlp_ratio), hidden_size)

    @property
    def fused(self) -> bool:
        """Whether :meth:`after_fc1` adds the first layer's bias."""
        return self.switches.fused_mlp and is_plain(self.fc1) and is_plain(self.fc2)

    def takes_gelu(self, x: Tensor) -> bool:
        """Whether the first layer's product gets GELU as its epilogue, and only ``fc2`` is left to run."""
        if torch.is_grad_enabled():  # the backward pass needs the input of GELU
            return False
        fused = self.fused and in_float8(self.fc1) is False
        return fused and gelu_epilogue(x, self.fc1.weight)

    def forward(self, x: Tensor) -> Tensor:
        if self.fused:
            return self.after_fc1(linear(x, self.fc1.weight, None, float8=in_float8(self.fc1)))
        return self.after_fc1(apply_linear(self.fc1, x))

    def after_fc1(self, hidden: Tensor) -> Tensor:
        """From the first layer's output, which includes its bias unless ``fused``."""
        if self.fused:
            weight, bias = self.fc2.weight, self.fc2.bias
            recompute, float8 = self.switches.recompute, in_float8(self.fc2)
            return gelu_linear(hidden, self.fc1.bias, weight, bias, recompute=recompute, float8=float8)
        return self.fc2(F.gelu(hidden, approximate="tanh"))


@known
class Block(WithoutOfficialParts):
    """A transformer block with adaLN-Zero conditioning and, in MDTv2, a long skip at its input."""

    absent = "norm1", "norm2"

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
        skip: Tensor | Embedded | None = None,
        ids_keep: Tensor | None = None,
        *,
        rows: Rows = WHOLE,
        masked: MaskPlan | None = None,
        activated: Tensor | None = None,
        modulation: Tensor | None = None,
    ) -> Tensor:
        """Map x to an output of its shape; c [B, D] is the sum of embedded times and labels.

        ``skip``: shaped like x, or the embedded input. ``ids_keep`` [B, K]: the positions of x [B, K, D];
        ``rows``: the same for packed samples. ``masked``: x [B, L, D] are whole grids, of which only the
        masked tokens are computed; the others stay. ``activated``: SiLU of c, and ``modulation`` [B, 6D]:
        this block's, if already computed.
        """
        if ids_keep is not None:
            rows = Rows(ids_keep)
        if self.checkpointing == "none" or not torch.is_grad_enabled():
            return self.compute(x, c, rows, skip, masked, activated, modulation)
        args = x, c, rows, skip, masked, activated, modulation
        return checkpointed(self, self.compute, self.checkpointing, *args)

    def compute(
        self,
        x: Tensor,
        c: Tensor,
        rows: Rows,
        skip: Tensor | Embedded | None,
        masked: MaskPlan | None,
        activated: Tensor | None,
        modulation: Tensor | None,
    ) -> Tensor:
        """:meth:`forward`, without gradient checkpointing."""
        if skip is not None and self.skip_linear is not None:
            x = self.mix(x, skip, self.skip_linear)
        if modulation is None:
            modulation = modulation_from(self.adaLN_modulation, c, activated)
        attn, mlp = self.attn, self.mlp  # looked up once: attribute access on a module is slow on the host
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation.chunk(6, dim=1)
        fused, recompute = self.switches.fused_adaln, self.switches.recompute
        how: dict[str, Any] = {"offsets": rows.offsets, "fused": fused, "recompute": recompute}
        whole = x
        if masked is None:
            if is_itself(attn, Attention):
                x, hidden = residual_norm_linear(x, shift_a, scale_a, attn.qkv, **how)
                attended = attn.after_qkv(hidden, rows)
            else:
                attended = attend(attn, norm(x, shift_a, scale_a, rows.offsets, fused), rows)
        else:
            x, D, qkv = gather_tokens(whole, masked.ids_mask), x.shape[-1], attn.qkv
            q = norm_linear(x, shift_a, scale_a, qkv, **how, outputs=slice(0, D))
            kv = norm_linear(whole, shift_a, scale_a, qkv, **how, outputs=slice(D, 3 * D))
            attended = attn.chosen(q, kv, masked.ids_mask)
        if is_itself(mlp, Mlp):
            gelu = mlp.takes_gelu(x)
            how |= {"with_bias": gelu or not mlp.fused, "gelu": gelu}
            x, hidden = gated_norm_linear(x, attended, gate_a, shift_m, scale_m, mlp.fc1, **how)
            y = apply_linear(mlp.fc2, hidden) if gelu else mlp.after_fc1(hidden)
        else:
            x, y = gated_norm_linear(x, attended, gate_a, shift_m, scale_m, mlp, **how)
        x = gated(x, y, gate_m, offsets=rows.offsets, fused=fused)
        return x if masked is None else merge_tokens(whole, x, masked.ids_restore)

    def mix(self, x: Tensor, skip: Tensor | Embedded, layer: nn.Linear) -> Tensor:
        """Apply ``layer`` to x and skip, concatenated along the width."""
        if isinstance(skip, Embedded):
            return patch_skip_linear(x, *skip, layer.weight, layer.bias)
        if is_plain(layer):
            return skip_linear(x, skip, layer.weight, layer.bias)
        return layer(torch.cat([x, skip], dim=-1))


def chooses_tokens(block: nn.Module) -> bool:
    """Whether ``block`` may be run on some tokens only. Not if something (except FSDP, which changes no
    values) observes the block or its attention over all tokens, or replaces them."""
    if not isinstance(block, Block) or not takes_ours(block, Block):
        return False
    if block._forward_hooks and not isinstance(block, FSDPModule):
        return False
    return is_itself(block.attn, Attention) and is_plain(block.attn.qkv)


def takes_factored(block: nn.Module) -> bool:
    """Whether ``block`` takes the embedded input in factored form, or does not look at it."""
    layer = vars(block)["_modules"].get("skip_linear")
    return takes_ours(block, Block) and (layer is None or is_plain(layer))


@known
class FinalLayer(WithoutOfficialParts):
    """Turn tokens [B, L, D] into patches [B, L, p*p*O], with the conditioning c [B, D]."""

    absent = ("norm_final",)

    def __init__(self, hidden_size: int, patch_size: int, out_channels: int) -> None:
        super().__init__()
        self.switches = Switches()
        self.linear = nn.Linear(hidden_size, patch_size * patch_size * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(
        self, x: Tensor, c: Tensor, *, activated: Tensor | None = None, modulation: Tensor | None = None
    ) -> Tensor:
        """``activated``: SiLU of c, and ``modulation`` [B, 2D]: this layer's, if already computed."""
        if modulation is None:
            modulation = modulation_from(self.adaLN_modulation, c, activated)
        shift, scale = modulation.chunk(2, dim=1)
        fused, recompute = self.switches.fused_adaln, self.switches.recompute
        return norm_linear(x, shift, scale, self.linear, offsets=None, fused=fused, recompute=recompute)


__all__ = ["Block", "Embedded", "FinalLayer", "Mlp", "Skip", "both_skips", "unpatchify"]
