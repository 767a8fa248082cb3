"""MDTv2 and MDT v1, built on ``mdt_fast.kernels``.

B samples, S side, C channels, O output channels, L tokens, K of them kept, R rows of a packed batch, D width.
Source: MDT (arXiv:2303.14389; MDTv2 is its second version).
"""

from typing import Any

import torch
from torch import Tensor, nn

from ..config import Family
from ..errors import UserError
from ..kernels import gather_tokens, unmask_tokens
from ..kernels.patch_embed.reference import patchify
from ..kernels.tokens import reference
from ..masking import MaskPlan
from . import rows
from .base import Transformer
from .blocks import Embedded, Skip, both_skips, chooses_tokens, takes_factored
from .conditioning import Conditioning
from .embed import embeds_plainly
from .rows import Rows


class MaskedTransformer(Transformer):
    """What both MDTs share: a pass, the two passes of a training step in one, the side-interpolater."""

    sideblocks: nn.ModuleList

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        y: Tensor,
        enable_mask: bool = False,
        mask_plan: MaskPlan | None = None,
        *,
        drop_labels: bool = True,
        x_masked: Tensor | None = None,
        y_masked: Tensor | None = None,
    ) -> Any:
        """Predict noise (and variance) [B, O, S, S] for noisy x [B, C, S, S], times t [B] and labels y [B].

        ``mask_plan`` drops tokens according to the plan, as in training. ``enable_mask`` without a plan draws
        a new one; it does nothing if the model's ``mask_ratio`` is None. ``drop_labels`` False keeps all
        labels, in training too. With ``x_masked`` this runs both passes of a training step and returns the
        two outputs of :meth:`training_step_outputs`, for wrappers of the model that see only its forward.
        Raises ``UserError`` for inputs that do not fit.
        """
        if x_masked is not None:
            y_masked = y if y_masked is None and not drop_labels else y_masked
            return self.training_step_outputs(x, x_masked, t, y, y_masked, mask_plan)
        if y_masked is not None:
            raise UserError("y_masked: goes with x_masked, which is not given")
        self.check_inputs(x, t, y)
        c = self.condition(t, y, drop=self.training and drop_labels)
        return self.one_pass(x, c, self.plan(x, enable_mask, mask_plan))

    def one_pass(self, x: Tensor, c: Conditioning, plan: MaskPlan | None) -> Tensor:
        tokens, skip = self.embed(x, plan)
        return self.from_tokens(tokens, skip, c, plan)

    def from_tokens(self, tokens: Tensor, skip: Skip, c: Conditioning, plan: MaskPlan | None) -> Tensor:
        """Turn the result of :meth:`embed` into the output [B, O, S, S]."""
        where = rows.kept(plan)
        if plan is not None:
            self.mark_lengths(tokens, where, plan)
        tokens = self.encode(tokens, c, where)
        tokens = self.join(tokens, c, plan)
        return self.image(self.decode(tokens, c, skip), c)

    def training_step_outputs(
        self,
        x_full: Tensor,
        x_masked: Tensor,
        t: Tensor,
        y: Tensor,
        y_masked: Tensor | None = None,
        mask_plan: MaskPlan | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Both passes of a training step: all tokens of ``x_full``, and the kept tokens of ``x_masked``.

        Equal to ``forward(x_full, t, y)`` and ``forward(x_masked, t, y, enable_mask=True)``, with random
        draws in that order, but computed as one batch, so every weight is read once. Shapes as in
        :meth:`forward`; returns both outputs. With ``y_masked`` (the labels of the second pass) no labels are
        dropped: y and ``y_masked`` are used as given. Under a wrapper (FSDP2, DDP) call ``forward(x_full, t,
        y, x_masked=...)``. Raises ``UserError`` for inputs that do not fit, and for an attention backend that
        cannot take them.
        """
        self.check_step_inputs(x_full, x_masked, t, y, y_masked)
        drop = y_masked is None and self.training and self.drops_by_itself
        if y_masked is None:
            y, y_masked = self.drop_labels(y), self.drop_labels(y)
        plan = self.plan(x_masked, True, mask_plan) or self.draw_plan(len(t), x_masked.device)
        if not self.switches.packed:
            full = self.one_pass(x_full, self.condition(t, y, drop), None)
            return full, self.one_pass(x_masked, self.condition(t, y_masked, drop), plan)

        self.check_packed()
        B, L, K = len(t), plan.num_tokens, plan.len_keep
        c = self.condition(torch.cat([t, t]), torch.cat([y, y_masked]), drop)
        (full, skip_full), (kept, skip_masked) = self.embed(x_full, None), self.embed(x_masked, plan)
        x = torch.cat([full.flatten(0, 1), kept.flatten(0, 1)])  # [R, D]: B samples of L, then B of K tokens
        where = rows.packed(plan)
        self.mark_lengths(x, where, plan)
        full, kept = self.encode(x, c, where).split([B * L, B * K])
        full = self.join(full.view(B, L, x.shape[1]), c.of(slice(0, B)), None)
        masked = self.join(kept.view(B, K, x.shape[1]), c.of(slice(B, 2 * B)), plan)
        x = self.decode(torch.cat([full, masked]), c, both_skips(skip_full, skip_masked))
        full, masked = self.image(x, c).chunk(2)
        return full, masked

    def check_step_inputs(
        self, x_full: Tensor, x_masked: Tensor, t: Tensor, y: Tensor, y_masked: Tensor | None
    ) -> None:
        """Run :meth:`check_inputs` for both passes."""
        self.check_inputs(x_full, t, y)
        labels, name = (y, "y") if y_masked is None else (y_masked, "y_masked")
        self.check_inputs(x_masked, t, labels, ("x_masked", name))

    def join(self, x: Tensor, c: Conditioning, plan: MaskPlan | None) -> Tensor:
        """Turn the encoder's output [B, K, D] into the decoder's input [B, L, D].

        The side block predicts the dropped tokens from the kept ones; kept tokens bypass it.
        """
        if plan is None:
            return x + self.decoder_pos_embed
        unmask = unmask_tokens if self.switches.fused_tokens else reference.unmask_tokens
        full = unmask(x, self.mask_token, self.decoder_pos_embed, plan.ids_restore)
        blocks = self.sideblocks
        if self.switches.masked_side and len(blocks) == 1 and chooses_tokens(blocks[0]):
            return self.run(blocks[0], full, c, masked=plan)
        side = full
        for block in blocks:
            side = self.run(block, side, c)
        return side.where(plan.mask[:, :, None] > 0, full)

    def embed(self, x: Tensor, plan: MaskPlan | None) -> tuple[Tensor, Skip]:
        """Turn images into the encoder's tokens [B, K, D], and the input that the decoder mixes in."""
        if embeds_plainly(self.x_embedder):
            return self.x_embedder(x, self.pos_embed, plan), None
        return self.kept(self.every_token(x), plan), None

    def kept(self, x: Tensor, plan: MaskPlan | None) -> Tensor:
        """The tokens of x [B, L, D] that the plan keeps, [B, K, D]."""
        if plan is None:
            return x
        if self.switches.fused_tokens:
            return gather_tokens(x, plan.ids_keep, plan.ids_restore)
        return reference.gather_tokens(x, plan.ids_keep)

    def encode(self, x: Tensor, c: Conditioning, rows: Rows) -> Tensor:
        raise NotImplementedError

    def decode(self, x: Tensor, c: Conditioning, skip: Skip) -> Tensor:
        raise NotImplementedError

    def plan(self, x: Tensor, enable_mask: bool, mask_plan: MaskPlan | None) -> MaskPlan | None:
        """The mask of this pass: the given one, a newly drawn one, or None to see all tokens."""
        B, L, ascending = x.shape[0], self.config.grid_size**2, self.switches.sorted_tokens
        if mask_plan is not None:
            if not isinstance(mask_plan, MaskPlan):
                raise UserError(f"mask_plan: got {type(mask_plan).__name__}, expected a MaskPlan or None")
            mask_plan.check(B, L, x.device)
            return mask_plan.sorted() if ascending else mask_plan
        return self.draw_plan(B, x.device) if enable_mask and self.mask_ratio is not None else None

    def draw_plan(self, batch: int, device: torch.device) -> MaskPlan:
        """Draw a mask for a training step from torch's default generators; see :meth:`MaskPlan.draw`."""
        if self.mask_ratio is None:
            raise UserError("mask_plan: needed, as the model's mask_ratio is None")
        return MaskPlan.draw(
            batch,
            self.config.grid_size**2,
            self.mask_ratio,
            random_ratio=self.family == "mdtv2",
            device=device,
            ascending=self.switches.sorted_tokens,
        )

    def check_packed(self) -> None:
        for block in self.every_block():
            backend = getattr(block.attn, "attention_backend", "auto")
            if backend in ("flex", "xformers"):
                raise UserError(
                    f"switches: packed does not go with attention_backend {backend!r}, "
                    "which takes no samples of different lengths; expected auto, triton, samples, sdpa"
                )


class MDTv2(MaskedTransformer):
    """Masked Diffusion Transformer v2: a U-shaped encoder, then a decoder that sees the embedded input."""

    family: Family = "mdtv2"

    def make_blocks(self) -> None:
        half = max(0, (self.depth - self.decode_layer) // 2)
        self.en_inblocks = self.blocks_of(half)
        self.en_outblocks = self.blocks_of(half, skip=True)
        self.de_blocks = self.blocks_of(self.decode_layer, skip=True)
        self.sideblocks = self.blocks_of(1)

    def embed(self, x: Tensor, plan: MaskPlan | None) -> tuple[Tensor, Skip]:
        plain = embeds_plainly(self.x_embedder) and all(map(takes_factored, self.de_blocks))
        # With a single sample this would save nothing: part of the work is done once per batch.
        if self.switches.thin_skip and x.shape[0] > 1 and plain:
            weight, bias = self.x_embedder.proj.weight, self.x_embedder.proj.bias
            assert bias is not None
            skip = Embedded(patchify(x, self.patch_size), weight.flatten(1), bias, self.pos_embed)
            return self.x_embedder(x, self.pos_embed, plan), skip
        tokens = self.every_token(x)
        return self.kept(tokens, plan), tokens

    def encode(self, x: Tensor, c: Conditioning, rows: Rows) -> Tensor:
        skips = []
        for block in self.en_inblocks:
            x = self.run(block, x, c, rows)
            skips.append(x)
        for block in self.en_outblocks:
            x = self.run(block, x, c, rows, skip=skips.pop())
        return x

    def decode(self, x: Tensor, c: Conditioning, skip: Skip) -> Tensor:
        for block in self.de_blocks:
            x = self.run(block, x, c, skip=skip)
        return x


class MDT(MaskedTransformer):
    """Masked Diffusion Transformer v1: a plain stack, joined before its last ``decode_layer`` blocks."""

    family: Family = "mdt"

    def make_blocks(self) -> None:
        self.blocks = self.blocks_of(self.depth)
        self.sideblocks = self.blocks_of(1)

    @property
    def encoder_length(self) -> int:
        """The number of blocks before the join, also when blocks have been removed or added."""
        return max(0, len(self.blocks) - self.decode_layer)

    def encode(self, x: Tensor, c: Conditioning, rows: Rows) -> Tensor:
        for block in self.blocks[: self.encoder_length]:
            x = self.run(block, x, c, rows)
        return x

    def decode(self, x: Tensor, c: Conditioning, skip: Skip) -> Tensor:
        for block in self.blocks[self.encoder_length :]:
            x = self.run(block, x, c)
        return x
