"""Self-attention on the ``rel_attention`` kernel. B samples, L tokens, D width, H heads, d = D/H."""

import torch
from torch import Tensor, nn

from ..kernels import rel_attention_qkvpacked
from ..reference.init import init_bias_table
from ..reference.layers import relative_position_index


class RelativePositionBias(nn.Module):
    """The bias table [(2G-1)^2 + 3, H] of one layer, with the index that official checkpoints hold.

    The kernel computes the index from positions; the buffer serves the ``state_dict`` alone, and all
    layers of a model share one (see :func:`share_index`).
    """

    def __init__(self, grid_size: int, num_heads: int) -> None:
        super().__init__()
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * grid_size - 1) ** 2 + 3, num_heads))
        self.relative_position_index: Tensor
        self.register_buffer("relative_position_index", relative_position_index(grid_size, grid_size))
        init_bias_table(self.relative_position_bias_table)


def share_index(model: nn.Module) -> None:
    """Make all layers of ``model`` hold one ``relative_position_index`` tensor instead of one each."""
    shared: Tensor | None = None
    for module in model.modules():
        if isinstance(module, RelativePositionBias):
            shared = module.relative_position_index if shared is None else shared
            module.relative_position_index = shared


class Attention(nn.Module):
    """Multi-head self-attention; with a relative position bias where ``grid_size`` is given (not in DiT)."""

    def __init__(self, hidden_size: int, num_heads: int, grid_size: int | None) -> None:
        super().__init__()
        self.attention_backend = "auto"
        self.num_heads = num_heads
        self.grid_size = grid_size or 0
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)
        self.rel_pos_bias = None if grid_size is None else RelativePositionBias(grid_size, num_heads)

    def forward(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        """x [B, L, D] -> [B, L, D]; ``positions`` [B, L] where the tokens are not the whole grid in order."""
        B, L, D = x.shape
        qkv = self.qkv(x).view(B, L, 3, self.num_heads, D // self.num_heads)
        table = None if self.rel_pos_bias is None else self.rel_pos_bias.relative_position_bias_table
        out = rel_attention_qkvpacked(
            qkv, table, grid_size=self.grid_size, pos=positions, attention_backend=self.attention_backend
        )
        return self.proj(out.reshape(B, L, D))
