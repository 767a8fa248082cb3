"""Images, timesteps and labels on their way in."""

from torch import Tensor, nn

from ..kernels import patch_embed
from ..reference.embed import LabelEmbedder, TimestepEmbedder

__all__ = ["LabelEmbedder", "PatchEmbed", "TimestepEmbedder"]


class PatchEmbed(nn.Module):
    """Images [B, C, S, S] -> tokens with their position embedding [B, L, D], in one kernel."""

    def __init__(self, patch_size: int, in_channels: int, hidden_size: int) -> None:
        super().__init__()
        # A convolution's parameters, under its name: official checkpoints hold them.
        self.proj = nn.Conv2d(in_channels, hidden_size, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Tensor, pos_embed: Tensor) -> Tensor:
        return patch_embed(x, self.proj.weight, self.proj.bias, pos_embed)
