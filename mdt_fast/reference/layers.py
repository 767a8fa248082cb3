"""The transformer's parts, written to be read.

B batch, L tokens (K of them kept in a masked pass), D width, H heads, d = D/H, G tokens along one
side, p patch side, O output channels.
"""

import torch
from torch import Tensor, nn

from .init import init_bias_table


def modulate(z: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """``z * (1 + scale) + shift``: z [B, L, D], one shift and scale [B, D] for all tokens of a sample."""
    return z * (1 + scale[:, None]) + shift[:, None]


def gather_tokens(x: Tensor, ids: Tensor) -> Tensor:
    """Select tokens ``ids`` [B, K] of x [B, L, D], giving [B, K, D]."""
    return x.gather(1, ids[:, :, None].expand(-1, -1, x.shape[2]))


def relative_position_index(rows: int, columns: int) -> Tensor:
    """The bias table's row for query i and key j, int64 [L, L]:
    ``(r_i - r_j + rows-1) * (2*columns-1) + (c_i - c_j + columns-1)``."""
    token = torch.arange(rows * columns)
    r, c = token // columns, token % columns
    return (r[:, None] - r + rows - 1) * (2 * columns - 1) + (c[:, None] - c + columns - 1)


class RelativePositionBias(nn.Module):
    """A learnt value for each head and each offset between two tokens: [H, L, L].

    The table ends with three rows that are never used; official checkpoints contain them.
    """

    def __init__(self, grid_size: int, num_heads: int) -> None:
        super().__init__()
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * grid_size - 1) ** 2 + 3, num_heads))
        self.relative_position_index: Tensor
        self.register_buffer("relative_position_index", relative_position_index(grid_size, grid_size))
        init_bias_table(self.relative_position_bias_table)

    def forward(self) -> Tensor:
        return self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1)


class Attention(nn.Module):
    """Multi-head self-attention, with a relative position bias if ``grid_size`` is given (not in DiT)."""

    def __init__(self, hidden_size: int, num_heads: int, grid_size: int | None) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)
        if grid_size is not None:
            self.rel_pos_bias = RelativePositionBias(grid_size, num_heads)

    def bias(self, ids_keep: Tensor | None) -> Tensor | float:
        """The bias [H, L, L] or, in a masked pass, [B, H, K, K]: each sample's kept rows and columns."""
        if not hasattr(self, "rel_pos_bias"):
            return 0.0
        bias = self.rel_pos_bias()
        if ids_keep is None:
            return bias
        return torch.stack([bias[:, ids][:, :, ids] for ids in ids_keep])

    def forward(self, x: Tensor, ids_keep: Tensor | None = None) -> Tensor:
        B, L, D = x.shape
        q, k, v = self.qkv(x).view(B, L, 3, self.num_heads, D // self.num_heads).permute(2, 0, 3, 1, 4)
        logits = q @ k.transpose(-2, -1) * (D // self.num_heads) ** -0.5 + self.bias(ids_keep)
        out = logits.softmax(dim=-1) @ v
        return self.proj(out.transpose(1, 2).reshape(B, L, D))


class Mlp(nn.Module):
    """Linear, GELU (tanh form), linear."""

    def __init__(self, hidden_size: int, mlp_ratio: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, int(hidden_size * mlp_ratio))
        self.act = nn.GELU(approximate="tanh")
        self.fc2 = nn.Linear(int(hidden_size * mlp_ratio), hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    """A transformer block with adaLN-Zero conditioning and, in MDTv2, a long skip at its input."""

    def __init__(
        self, hidden_size: int, num_heads: int, mlp_ratio: float, grid_size: int | None, skip: bool = False
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(hidden_size, num_heads, grid_size)
        self.norm2 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(hidden_size, mlp_ratio)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))
        if skip:
            self.skip_linear = nn.Linear(2 * hidden_size, hidden_size)

    def forward(
        self, x: Tensor, c: Tensor, skip: Tensor | None = None, ids_keep: Tensor | None = None
    ) -> Tensor:
        if skip is not None:
            x = self.skip_linear(torch.cat([x, skip], dim=-1))
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate_a[:, None] * self.attn(modulate(self.norm1(x), shift_a, scale_a), ids_keep)
        return x + gate_m[:, None] * self.mlp(modulate(self.norm2(x), shift_m, scale_m))


class FinalLayer(nn.Module):
    """Turn tokens [B, L, D] into patches [B, L, p*p*O]."""

    def __init__(self, hidden_size: int, patch_size: int, out_channels: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(hidden_size, patch_size * patch_size * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


def unpatchify(x: Tensor, patch_size: int, out_channels: int) -> Tensor:
    """Turn patches [B, L, p*p*O], channel fastest, into images [B, O, S, S]."""
    p, G = patch_size, int(x.shape[1] ** 0.5)
    x = x.view(-1, G, G, p, p, out_channels).permute(0, 5, 1, 3, 2, 4)
    return x.reshape(-1, out_channels, G * p, G * p)
