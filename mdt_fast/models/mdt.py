"""MDTv2 and MDT v1 on the kernel rooms. B batch, S side, C channels, O output channels, L tokens, D width.

Source: MDT (arXiv:2303.14389; MDTv2 is its second version).
"""

from torch import Tensor, nn

from ..config import Family
from ..errors import UserError
from ..kernels import gather_tokens, unmask_tokens
from ..masking import MaskPlan
from .base import Transformer


class MaskedTransformer(Transformer):
    """What both MDTs share: the mask of a pass and the side-interpolater."""

    sideblocks: nn.ModuleList

    def plan(self, x: Tensor, enable_mask: bool, mask_plan: MaskPlan | None) -> MaskPlan | None:
        """The mask of this pass (kept tokens ascending): the given one, a new one, or None for all tokens."""
        B, L, _ = x.shape
        if mask_plan is not None:
            if not isinstance(mask_plan, MaskPlan):
                raise UserError(f"mask_plan: got {type(mask_plan).__name__}, expected a MaskPlan or None")
            mask_plan.check(B, L, x.device)
        elif enable_mask and self.mask_ratio is not None:
            mask_plan = MaskPlan.draw(
                B, L, self.mask_ratio, random_ratio=self.family == "mdtv2", device=x.device
            )
        return None if mask_plan is None else mask_plan.sorted()

    def join(self, x: Tensor, c: Tensor, plan: MaskPlan | None) -> Tensor:
        """Encoder's output [B, K, D] -> decoder's input [B, L, D].

        The side block predicts the dropped tokens from the kept ones; kept tokens bypass it.
        """
        if plan is None:
            return x + self.decoder_pos_embed
        full = unmask_tokens(x, self.mask_token, self.decoder_pos_embed, plan.ids_restore)
        side = self.sideblocks[0](full, c)
        return side.where(plan.mask[:, :, None] > 0, full)


class MDTv2(MaskedTransformer):
    """Masked Diffusion Transformer v2: a U-shaped encoder, then a decoder that sees the embedded input."""

    family: Family = "mdtv2"

    def make_blocks(self) -> None:
        half = max(0, (self.depth - self.decode_layer) // 2)
        self.en_inblocks = self.blocks_of(half)
        self.en_outblocks = self.blocks_of(half, skip=True)
        self.de_blocks = self.blocks_of(self.decode_layer, skip=True)
        self.sideblocks = self.blocks_of(1)

    def forward(
        self, x: Tensor, t: Tensor, y: Tensor, enable_mask: bool = False, mask_plan: MaskPlan | None = None
    ) -> Tensor:
        """Predicted noise (and variance) [B, O, S, S] of noisy x [B, C, S, S] at times t [B], labels y [B].

        ``enable_mask`` drops tokens as in training, by ``mask_plan`` or, without one, by a new plan; it does
        nothing where the model's ``mask_ratio`` is None. Raises ``UserError`` for inputs that do not fit.
        """
        tokens, c = self.embed(x, t, y)
        plan = self.plan(tokens, enable_mask, mask_plan)
        positions = None if plan is None else plan.ids_keep
        x = tokens if plan is None else gather_tokens(tokens, plan.ids_keep, plan.ids_restore)

        skips = []
        for block in self.en_inblocks:
            x = block(x, c, positions=positions)
            skips.append(x)
        for block in self.en_outblocks:
            x = block(x, c, skip=skips.pop(), positions=positions)
        x = self.join(x, c, plan)
        for block in self.de_blocks:
            x = block(x, c, skip=tokens)
        return self.image(x, c)


class MDT(MaskedTransformer):
    """Masked Diffusion Transformer v1: a plain stack, joined before its last ``decode_layer`` blocks."""

    family: Family = "mdt"

    def make_blocks(self) -> None:
        self.blocks = self.blocks_of(self.depth)
        self.sideblocks = self.blocks_of(1)

    def forward(
        self, x: Tensor, t: Tensor, y: Tensor, enable_mask: bool = False, mask_plan: MaskPlan | None = None
    ) -> Tensor:
        """As :meth:`MDTv2.forward`."""
        tokens, c = self.embed(x, t, y)
        plan = self.plan(tokens, enable_mask, mask_plan)
        positions = None if plan is None else plan.ids_keep
        x = tokens if plan is None else gather_tokens(tokens, plan.ids_keep, plan.ids_restore)

        encoder = self.depth - self.decode_layer
        for block in self.blocks[:encoder]:
            x = block(x, c, positions=positions)
        x = self.join(x, c, plan)
        for block in self.blocks[encoder:]:
            x = block(x, c)
        return self.image(x, c)
