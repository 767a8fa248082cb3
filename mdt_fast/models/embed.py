"""Embeddings of images, timesteps and labels."""

from typing import Any, TypeGuard

from torch import Tensor, nn

from ..config import Switches
from ..kernels import patch_embed
from ..kernels.tokens import reference
from ..masking import MaskPlan
from ..reference.embed import LabelEmbedder, TimestepEmbedder
from .absent import WithoutOfficialParts
from .own import is_itself, is_plain, known

__all__ = ["LabelEmbedder", "PatchEmbed", "TimestepEmbedder"]


@known
class PatchEmbed(WithoutOfficialParts):
    """Embed images [B, C, S, S] as tokens with position embedding [B, L, D], in one kernel."""

    absent = ("norm",)

    def __init__(self, patch_size: int, in_channels: int, hidden_size: int) -> None:
        super().__init__()
        self.switches = Switches()
        # A convolution's parameters, under the name used in official checkpoints.
        self.proj = nn.Conv2d(in_channels, hidden_size, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Tensor, pos_embed: Tensor | None = None, plan: MaskPlan | None = None) -> Tensor:
        """With a plan, only the tokens it keeps: [B, K, D]; without ``pos_embed``, the patches alone."""
        if pos_embed is not None and self.switches.fused_tokens and is_patchwise(self.proj):
            weight, bias = self.proj.weight, self.proj.bias
            return patch_embed(x, weight, bias, pos_embed, None if plan is None else plan.ids_keep)
        tokens = self.proj(x).flatten(2).transpose(1, 2)
        if pos_embed is not None:
            tokens = tokens + pos_embed
        return tokens if plan is None else reference.gather_tokens(tokens, plan.ids_keep)


def is_patchwise(layer: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether ``layer`` is a product of each patch with a weight, with nothing left out or shared."""
    if not is_plain(layer, nn.Conv2d):
        return False
    conv: Any = layer
    apart = conv.stride == conv.kernel_size and conv.padding in ((0, 0), "valid")
    return apart and conv.dilation == (1, 1) and conv.groups == 1


def embeds_plainly(embedder: nn.Module) -> bool:
    """Whether the convolution's parameters fully describe what ``embedder`` computes."""
    return is_itself(embedder, PatchEmbed) and is_patchwise(embedder.get_submodule("proj"))
