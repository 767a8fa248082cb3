"""Plain PyTorch, any device and dtype. B samples, H heads, M queries, N keys, d head size, G grid side."""

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from .call import Call


def relative_bias(table_RH: Tensor, grid_size: int, q_pos: Tensor, k_pos: Tensor) -> Tensor:
    """The bias between tokens at the given grid positions (0..G*G-1, in row-major order).

    ``table`` is [(2G-1)^2 + 3, H]; ``q_pos`` is [M] or [B, M] and ``k_pos`` is [N] or [B, N] (int64). The
    result is [H, M, N], or [B, H, M, N] if the positions differ per sample.
    """
    u_q, u_k = coordinates(q_pos, grid_size), coordinates(k_pos, grid_size)
    index = u_q[..., :, None] - u_k[..., None, :] + center(grid_size)
    # gather's gradient is a scatter_add over one row per head, many times faster on a CPU than indexing's.
    H, (*batch, M, N) = table_RH.shape[1], index.shape
    flat = index.reshape(*batch, 1, M * N).expand(*batch, H, -1)
    return table_RH.t().expand(*batch, -1, -1).gather(-1, flat).view(*batch, H, M, N)


def coordinates(pos: Tensor, grid_size: int) -> Tensor:
    """row * (2G-1) + column. The difference of two of them, plus :func:`center`, is a row of the table."""
    return pos // grid_size * (2 * grid_size - 1) + pos % grid_size


def center(grid_size: int) -> int:
    """The table's row for a token and itself."""
    return 2 * grid_size * (grid_size - 1)


def bias_mask(
    q_BHMd: Tensor,
    table_RH: Tensor,
    call: "Call",
    q_pos: Tensor | None,
    k_pos: Tensor | None,
    multiple: int = 1,
) -> Tensor:
    """The bias [B, H, M, N] in the dtype of q: one per sample if the positions differ, else an expanded view.

    The stride of its rows is a multiple of ``multiple`` elements; memory-efficient attention needs 8.
    """
    if torch.is_grad_enabled() and table_RH.requires_grad and table_RH.element_size() == 2:
        table_RH = table_RH.float()  # the gradient of a row sums hundreds of numbers
    every = torch.arange(call.grid_size**2, device=q_BHMd.device)
    q_pos, k_pos = (every if pos is None else pos for pos in (q_pos, k_pos))
    if multiple == 1:
        bias = relative_bias(table_RH, call.grid_size, q_pos, k_pos).to(q_BHMd.dtype)
    else:
        N = k_pos.shape[-1]
        k_pos = F.pad(k_pos, (0, -N % multiple))
        bias = relative_bias(table_RH, call.grid_size, q_pos, k_pos).to(q_BHMd.dtype)[..., :N]
    return bias.expand(q_BHMd.shape[0], -1, -1, -1)


def rel_attention(q: Tensor, k: Tensor, v: Tensor, table_RH: Tensor | None, call: "Call") -> Tensor:
    """q [B, H, M, d], k and v [B, H, N, d]; or a packed batch [R, H, d], computed one sample at a time."""
    queries, keys = call.queries, call.keys
    if queries.offsets is None or keys.offsets is None:
        return _attend(q, k, v, table_RH, call, queries.pos, keys.pos)
    rows_q, rows_k = (offsets.diff().tolist() for offsets in (queries.offsets, keys.offsets))
    outputs = []
    for i, (q_MHd, k_NHd, v_NHd) in enumerate(zip(q.split(rows_q), k.split(rows_k), v.split(rows_k))):
        q_pos = None if queries.pos is None else queries.pos.split(rows_q)[i][None]
        k_pos = None if keys.pos is None else keys.pos.split(rows_k)[i][None]
        q_1, k_1, v_1 = (x.transpose(0, 1)[None] for x in (q_MHd, k_NHd, v_NHd))
        outputs.append(_attend(q_1, k_1, v_1, table_RH, call, q_pos, k_pos)[0].transpose(0, 1))
    return torch.cat(outputs) if outputs else q.clone()


def _attend(
    q_BHMd: Tensor,
    k_BHNd: Tensor,
    v_BHNd: Tensor,
    table_RH: Tensor | None,
    call: "Call",
    q_pos: Tensor | None,
    k_pos: Tensor | None,
) -> Tensor:
    if not k_BHNd.shape[2]:
        return q_BHMd @ k_BHNd.transpose(2, 3) @ v_BHNd  # zeros, with gradients
    if table_RH is None:
        return F.scaled_dot_product_attention(q_BHMd, k_BHNd, v_BHNd, scale=call.scale)
    # One mask per sample as an expanded view. With [H, M, N], PyTorch takes its slowest path on a CPU.
    mask = bias_mask(q_BHMd, table_RH, call, q_pos, k_pos, multiple=8 if q_BHMd.is_cuda else 1)
    return F.scaled_dot_product_attention(q_BHMd, k_BHNd, v_BHNd, attn_mask=mask, scale=call.scale)
