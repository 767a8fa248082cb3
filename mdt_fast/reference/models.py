"""MDT v1, MDTv2 and DiT, step by step in plain PyTorch: the oracle of tests and benchmarks.

B batch, S side of the image (or latent), C its channels, O output channels, L tokens, K kept tokens, D width.
"""

import math

import torch
from torch import Tensor, nn

from ..config import Family, ModelConfig
from ..masking import MaskPlan
from .embed import LabelEmbedder, PatchEmbed, TimestepEmbedder
from .init import initialise
from .layers import Block, FinalLayer, gather_tokens, unpatchify


class _Transformer(nn.Module):
    """What the three models share: input embeddings, output patches to images, guidance."""

    family: Family

    def __init__(
        self,
        input_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        class_dropout_prob: float = 0.1,
        num_classes: int = 1000,
        learn_sigma: bool = True,
        mask_ratio: float | str | None = None,
        decode_layer: int | str | None = None,
    ) -> None:
        super().__init__()
        self.config = config = ModelConfig.of(
            self.family,
            input_size=input_size,
            patch_size=patch_size,
            in_channels=in_channels,
            hidden_size=hidden_size,
            depth=depth,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            class_dropout_prob=class_dropout_prob,
            num_classes=num_classes,
            learn_sigma=learn_sigma,
            mask_ratio=mask_ratio,
            decode_layer=decode_layer,
        )
        self.mask_ratio = config.mask_ratio
        self.make_parameters()
        self.make_blocks()
        self.final_layer = FinalLayer(hidden_size, patch_size, config.out_channels)
        initialise(self, config.grid_size)

    def make_parameters(self) -> None:
        """Make all parameters except those of the blocks and the last layer."""
        config = self.config
        L, D = config.grid_size**2, config.hidden_size
        self.pos_embed = nn.Parameter(torch.zeros(1, L, D), requires_grad=self.family != "dit")
        if self.family != "dit":
            self.decoder_pos_embed = nn.Parameter(torch.zeros(1, L, D))
            self.mask_token = nn.Parameter(torch.zeros(1, 1, D), requires_grad=config.mask_ratio is not None)
        self.x_embedder = PatchEmbed(config.patch_size, config.in_channels, D)
        self.t_embedder = TimestepEmbedder(D)
        self.y_embedder = LabelEmbedder(config.num_classes, D, config.class_dropout_prob)

    def make_blocks(self) -> None:
        """Make the blocks, under the names used in the ``state_dict``."""
        raise NotImplementedError

    def blocks_of(self, number: int, skip: bool = False) -> nn.ModuleList:
        config = self.config
        grid_size = None if self.family == "dit" else config.grid_size
        return nn.ModuleList(
            Block(config.hidden_size, config.num_heads, config.mlp_ratio, grid_size, skip)
            for _ in range(number)
        )

    def embed(self, x: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens [B, L, D] and conditioning [B, D]."""
        return self.x_embedder(x) + self.pos_embed, self.t_embedder(t) + self.y_embedder(y, self.training)

    def image(self, x: Tensor, c: Tensor) -> Tensor:
        """Turn tokens [B, L, D] into images [B, O, S, S]."""
        return unpatchify(self.final_layer(x, c), self.config.patch_size, self.config.out_channels)

    def forward_with_cfg(
        self,
        x: Tensor,
        t: Tensor,
        y: Tensor,
        cfg_scale: float | None = None,
        diffusion_steps: int = 1000,
        scale_pow: float | None = 4.0,
    ) -> Tensor:
        """Guided output for x [2n, C, S, S], of which the first n are used; y: n classes, n null classes.

        The guidance weight rises from 1 at t = diffusion_steps to ``cfg_scale`` at t = 0 (power-cosine), or
        is constant if ``scale_pow`` is None. With four channels the first three are guided and the others
        stay raw; with any other number all are guided.
        """
        if cfg_scale is None:
            return self(x, t, y)
        half = x[: len(x) // 2]
        out = self(torch.cat([half, half]), t, y)
        channels = 3 if self.config.in_channels == 4 else self.config.in_channels
        cond, uncond = out[:, :channels].chunk(2)
        if scale_pow is None:
            scale = torch.full_like(t[: len(half)], cfg_scale, dtype=torch.float32)
        else:
            phase = math.pi * (1 - t[: len(half)] / diffusion_steps) ** scale_pow
            scale = 1 + (cfg_scale - 1) * (1 - phase.cos()) / 2
        guided = uncond + scale[:, None, None, None] * (cond - uncond)
        return torch.cat([torch.cat([guided, guided]), out[:, channels:]], dim=1)


class _MaskedTransformer(_Transformer):
    """What the two MDTs share: the mask and the side-interpolater."""

    sideblocks: nn.ModuleList

    def plan(self, x: Tensor, enable_mask: bool, mask_plan: MaskPlan | None) -> MaskPlan | None:
        """The mask of this pass: the given one, a new one, or None to see all tokens."""
        if mask_plan is None and enable_mask and self.mask_ratio is not None:
            B, L, _ = x.shape
            return MaskPlan.draw(B, L, self.mask_ratio, random_ratio=self.family == "mdtv2", device=x.device)
        return mask_plan

    def join(self, x: Tensor, c: Tensor, plan: MaskPlan | None) -> Tensor:
        """Turn the encoder's output [B, K, D] into the decoder's input [B, L, D].

        The side block predicts dropped tokens from the kept ones; kept tokens bypass it.
        """
        if plan is None:
            return x + self.decoder_pos_embed
        mask_tokens = self.mask_token.expand(x.shape[0], plan.num_tokens - plan.len_keep, -1)
        full = gather_tokens(torch.cat([x, mask_tokens], dim=1), plan.ids_restore) + self.decoder_pos_embed
        side = full
        for block in self.sideblocks:
            side = block(side, c)
        mask = plan.mask[:, :, None].to(x.dtype)
        return side * mask + full * (1 - mask)


class MDTv2(_MaskedTransformer):
    """Masked Diffusion Transformer v2: a U-shaped encoder, then a decoder that sees the embedded input."""

    family: Family = "mdtv2"

    def make_blocks(self) -> None:
        half = max(0, (self.config.depth - self.config.decode_layer) // 2)
        self.en_inblocks = self.blocks_of(half)
        self.en_outblocks = self.blocks_of(half, skip=True)
        self.de_blocks = self.blocks_of(self.config.decode_layer, skip=True)
        self.sideblocks = self.blocks_of(1)

    def forward(
        self, x: Tensor, t: Tensor, y: Tensor, enable_mask: bool = False, mask_plan: MaskPlan | None = None
    ) -> Tensor:
        """x [B, C, S, S], t [B], y [B] -> [B, O, S, S]."""
        tokens, c = self.embed(x, t, y)
        plan = self.plan(tokens, enable_mask, mask_plan)
        ids_keep = None if plan is None else plan.ids_keep
        x = tokens if plan is None else gather_tokens(tokens, plan.ids_keep)

        skips = []
        for block in self.en_inblocks:
            x = block(x, c, ids_keep=ids_keep)
            skips.append(x)
        for block in self.en_outblocks:
            x = block(x, c, skip=skips.pop(), ids_keep=ids_keep)
        x = self.join(x, c, plan)
        for block in self.de_blocks:
            x = block(x, c, skip=tokens)
        return self.image(x, c)


class MDT(_MaskedTransformer):
    """Masked Diffusion Transformer v1: a plain stack, joined before its last ``decode_layer`` blocks."""

    family: Family = "mdt"

    def make_blocks(self) -> None:
        self.blocks = self.blocks_of(self.config.depth)
        self.sideblocks = self.blocks_of(1)

    def forward(
        self, x: Tensor, t: Tensor, y: Tensor, enable_mask: bool = False, mask_plan: MaskPlan | None = None
    ) -> Tensor:
        """x [B, C, S, S], t [B], y [B] -> [B, O, S, S]."""
        tokens, c = self.embed(x, t, y)
        plan = self.plan(tokens, enable_mask, mask_plan)
        ids_keep = None if plan is None else plan.ids_keep
        x = tokens if plan is None else gather_tokens(tokens, plan.ids_keep)

        encoder = max(0, len(self.blocks) - self.config.decode_layer)
        for block in self.blocks[:encoder]:
            x = block(x, c, ids_keep=ids_keep)
        x = self.join(x, c, plan)
        for block in self.blocks[encoder:]:
            x = block(x, c)
        return self.image(x, c)


class DiT(_Transformer):
    """Diffusion Transformer, the baseline: no relative position bias, no masks, fixed position embedding."""

    family: Family = "dit"

    def make_blocks(self) -> None:
        self.blocks = self.blocks_of(self.config.depth)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """x [B, C, S, S], t [B], y [B] -> [B, O, S, S]."""
        x, c = self.embed(x, t, y)
        for block in self.blocks:
            x = block(x, c)
        return self.image(x, c)

    def forward_with_cfg(
        self,
        x: Tensor,
        t: Tensor,
        y: Tensor,
        cfg_scale: float | None = None,
        diffusion_steps: int = 1000,
        scale_pow: float | None = None,
    ) -> Tensor:
        """As in MDT, but the guidance weight is ``cfg_scale`` at every t unless ``scale_pow`` is given."""
        return super().forward_with_cfg(x, t, y, cfg_scale, diffusion_steps, scale_pow)
