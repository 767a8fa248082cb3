"""The transformer block and the last layer, on the kernel rooms. B samples, L tokens, D width."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels import bias_gelu, gate_residual_ln_modulate, ln_modulate, skip_linear
from ..reference.layers import unpatchify
from .attention import Attention


class Mlp(nn.Module):
    """Linear, bias and GELU (tanh form), linear."""

    def __init__(self, hidden_size: int, mlp_ratio: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, int(hidden_size * mlp_ratio))
        self.fc2 = nn.Linear(int(hidden_size * mlp_ratio), hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(bias_gelu(F.linear(x, self.fc1.weight), self.fc1.bias))


class Block(nn.Module):
    """A transformer block with adaLN-Zero conditioning, and in MDTv2 a long skip on entry."""

    def __init__(
        self, hidden_size: int, num_heads: int, mlp_ratio: float, grid_size: int | None, skip: bool = False
    ) -> None:
        super().__init__()
        self.attn = Attention(hidden_size, num_heads, grid_size)
        self.mlp = Mlp(hidden_size, mlp_ratio)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))
        self.skip_linear = nn.Linear(2 * hidden_size, hidden_size) if skip else None

    def forward(
        self, x: Tensor, c: Tensor, skip: Tensor | None = None, positions: Tensor | None = None
    ) -> Tensor:
        """x [B, L, D], c [B, D] -> [B, L, D]; ``skip`` like x; ``positions`` [B, L] of kept tokens."""
        if self.skip_linear is not None and skip is not None:
            x = skip_linear(x, skip, self.skip_linear.weight, self.skip_linear.bias)
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(c).chunk(6, dim=1)
        attended = self.attn(ln_modulate(x, shift_a, scale_a), positions)
        x, normal = gate_residual_ln_modulate(x, attended, gate_a, shift_m, scale_m)
        return torch.addcmul(x, gate_m[:, None], self.mlp(normal))


class FinalLayer(nn.Module):
    """Tokens to patches: [B, L, D] -> [B, L, p*p*O]."""

    def __init__(self, hidden_size: int, patch_size: int, out_channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, patch_size * patch_size * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(ln_modulate(x, shift, scale))


__all__ = ["Block", "FinalLayer", "Mlp", "unpatchify"]
