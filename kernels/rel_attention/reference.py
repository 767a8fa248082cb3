"""Plain PyTorch, any device and dtype. B samples, H heads, M queries, N keys, d head size, G grid side."""

import torch
import torch.nn.functional as F
from torch import Tensor


def relative_bias(table_RH: Tensor, grid_size: int, q_pos: Tensor, k_pos: Tensor) -> Tensor:
    """The bias between tokens at these positions (numbers 0..G*G-1, row by row).

    ``table`` [(2G-1)^2 + 3, H]; ``q_pos`` [M] or [B, M], ``k_pos`` [N] or [B, N] (int64). Returns [H, M, N],
    or [B, H, M, N] where positions differ per sample.
    """
    # row * (2G-1) + column turns the difference of two positions into the difference of two numbers.
    stride, center = 2 * grid_size - 1, grid_size - 1
    u_q = q_pos // grid_size * stride + q_pos % grid_size
    u_k = k_pos // grid_size * stride + k_pos % grid_size
    index = u_q[..., :, None] - u_k[..., None, :] + center * (stride + 1)
    # gather's gradient is a scatter_add over one row per head: many times faster on a CPU than indexing's.
    H, (*batch, M, N) = table_RH.shape[1], index.shape
    flat = index.reshape(*batch, 1, M * N).expand(*batch, H, -1)
    return table_RH.t().expand(*batch, -1, -1).gather(-1, flat).view(*batch, H, M, N)


def rel_attention(
    q_BHMd: Tensor,
    k_BHNd: Tensor,
    v_BHNd: Tensor,
    table_RH: Tensor | None,
    grid_size: int,
    q_pos: Tensor | None,
    k_pos: Tensor | None,
) -> Tensor:
    if table_RH is None:
        return F.scaled_dot_product_attention(q_BHMd, k_BHNd, v_BHNd)
    every = torch.arange(grid_size**2, device=q_BHMd.device)
    bias = relative_bias(
        table_RH, grid_size, every if q_pos is None else q_pos, every if k_pos is None else k_pos
    )
    # Spelt out for every sample, without memory: given [H, M, N], PyTorch takes its slowest way on a CPU.
    bias = bias.to(q_BHMd.dtype).expand(len(q_BHMd), -1, -1, -1)
    return F.scaled_dot_product_attention(q_BHMd, k_BHNd, v_BHNd, attn_mask=bias)
