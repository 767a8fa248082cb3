"""DiT (arXiv:2212.09748), the baseline: no relative position bias, no masks, fixed position embedding."""

from torch import Tensor

from ..config import Family
from .base import Transformer
from .conditioning import Conditioning


class DiT(Transformer):
    """Diffusion Transformer. B batch, S side, C channels, O output channels."""

    family: Family = "dit"

    def make_blocks(self) -> None:
        self.blocks = self.blocks_of(self.depth)

    def forward(self, x: Tensor, t: Tensor, y: Tensor, *, drop_labels: bool = True) -> Tensor:
        """Predict noise (and variance) [B, O, S, S] for noisy x [B, C, S, S], times t [B] and labels y [B].

        ``drop_labels`` False keeps all labels, in training too. Raises ``UserError`` for inputs that do not
        fit.
        """
        self.check_inputs(x, t, y)
        c = self.condition(t, y, drop=self.training and drop_labels)
        return self.from_tokens(*self.embed(x), c)

    def embed(self, x: Tensor, plan: None = None) -> tuple[Tensor, None]:
        """Turn images into tokens [B, L, D]. DiT has no masks and no long skips."""
        return self.every_token(x), None

    def from_tokens(self, tokens: Tensor, skip: None, c: Conditioning, plan: None = None) -> Tensor:
        """Turn the result of :meth:`embed` into the output [B, O, S, S]."""
        for block in self.blocks:
            tokens = self.run(block, tokens, c)
        return self.image(tokens, c)

    def forward_with_cfg(
        self,
        x: Tensor,
        t: Tensor,
        y: Tensor,
        cfg_scale: float | Tensor | None = None,
        diffusion_steps: int = 1000,
        scale_pow: float | None = None,
    ) -> Tensor:
        """As in MDT, but the guidance weight is ``cfg_scale`` at every t unless ``scale_pow`` is given."""
        return super().forward_with_cfg(x, t, y, cfg_scale, diffusion_steps, scale_pow)
