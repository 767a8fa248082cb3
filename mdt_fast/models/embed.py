"""Embeddings of images, timesteps and labels."""

from torch import Tensor, nn

from ..config import Switches
from ..kernels import patch_embed
from ..kernels.tokens import reference
from ..masking import MaskPlan
from ..reference.embed import LabelEmbedder, TimestepEmbedder
from .ops import is_itself, is_plain, known

__all__ = ["LabelEmbedder", "PatchEmbed", "TimestepEmbedder"]


@known
class PatchEmbed(nn.Module):
    """Embed images [B, C, S, S] as tokens with position embedding [B, L, D], in one kernel."""

    def __init__(self, patch_size: int, in_channels: int, hidden_size: int) -> None:
        super().__init__()
        self.switches = Switches()
        # A convolution's parameters, under the name used in official checkpoints.
        self.proj = nn.Conv2d(in_channels, hidden_size, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Tensor, pos_embed: Tensor, plan: MaskPlan | None = None) -> Tensor:
        """With a plan, only the tokens it keeps: [B, K, D]."""
        if self.switches.fused_tokens and is_plain(self.proj, nn.Conv2d):
            weight, bias = self.proj.weight, self.proj.bias
            return patch_embed(x, weight, bias, pos_embed, None if plan is None else plan.ids_keep)
        tokens = self.proj(x).flatten(2).transpose(1, 2) + pos_embed
        return tokens if plan is None else reference.gather_tokens(tokens, plan.ids_keep)


def embeds_plainly(embedder: nn.Module) -> bool:
    """Whether the convolution's parameters fully describe what ``embedder`` computes."""
    return is_itself(embedder, PatchEmbed) and is_plain(embedder.get_submodule("proj"), nn.Conv2d)
