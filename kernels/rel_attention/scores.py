"""Attention of a group of samples on a CPU, in PyTorch, for any dtype.

n samples of a group, H heads, M queries, N keys, d head size, T table rows, G grid side.
"""

import torch
from torch import Tensor

from .call import Call
from .groups import Group, wide
from .reference import center, coordinates


class Scores:
    """Attention and its gradients, group by group; each group's bias is read from the table."""

    def __init__(self, table_RH: Tensor | None, call: Call, like: Tensor, with_gradient: bool):
        self.call = call
        self.table_HT = None if table_RH is None else table_RH.t().to(wide(like)).contiguous()
        self.every = torch.arange(call.grid_size**2, device=like.device)
        self.whole: Tensor | None = None
        self.whole_gradient: Tensor | None = None
        self.gradient_HT = (
            None if self.table_HT is None or not with_gradient else torch.zeros_like(self.table_HT)
        )

    def attend(self, group: Group, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> None:
        """Write ``out`` [n, H, M, d] and ``lse`` [n, H, M], by PyTorch's fused attention."""
        mask = self._bias(group)
        result, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, attn_mask=None if mask is None else mask.to(q.dtype), scale=self.call.scale
        )
        out.copy_(result)
        lse.copy_(sums)

    def differentiate(
        self, group: Group, q: Tensor, dout: Tensor, out: Tensor, lse: Tensor, k: Tensor, v: Tensor,
        dq: Tensor, dk: Tensor, dv: Tensor,
    ) -> None:  # fmt: skip
        """Write ``dq`` [n, H, M, d], ``dk`` and ``dv`` [n, H, N, d], and add to the table's gradient."""
        mask, scale = self._bias(group), self.call.scale
        p = torch.matmul(q, k.mT).to(lse.dtype).mul_(scale)
        p = p if mask is None else p.add_(mask)
        p.sub_(lse[..., None]).exp_()
        delta = (dout.to(lse.dtype) * out).sum(-1, keepdim=True)
        ds = torch.matmul(dout, v.mT).to(lse.dtype).sub_(delta).mul_(p)
        if self.gradient_HT is not None:
            self._add_gradient(group, ds)
        p, ds = p.to(q.dtype), ds.to(q.dtype)
        torch.mul(torch.matmul(ds, k), scale, out=dq)
        torch.mul(torch.matmul(ds.mT, q), scale, out=dk)
        dv.copy_(torch.matmul(p.mT, dout))

    def table_gradient(self) -> Tensor:
        """The table's gradient [T, H], summed over all groups."""
        assert self.gradient_HT is not None
        if self.whole_gradient is not None:
            self._scatter(None, None, self.whole_gradient[None])
        return self.gradient_HT.t()

    def _bias(self, group: Group) -> Tensor | None:
        """[n, H, M, N]; an expanded view for whole grids."""
        if self.table_HT is None:
            return None
        if not self._is_whole(group):
            return self._read(*self._positions(group))
        if self.whole is None:
            self.whole = self._read(None, None)
        return self.whole.expand(group.q.count, -1, -1, -1)

    def _add_gradient(self, group: Group, ds_nHMN: Tensor) -> None:
        if not self._is_whole(group):
            self._scatter(*self._positions(group), ds_nHMN)
        elif self.whole_gradient is None:
            self.whole_gradient = ds_nHMN.sum(0)
        else:
            self.whole_gradient.add_(ds_nHMN.sum(0))

    def _positions(self, group: Group) -> tuple[Tensor | None, Tensor | None]:
        """[n, rows]; None means the whole grid in order."""
        q, k = self.call.queries.pos, self.call.keys.pos
        return (
            None if q is None else group.q.of_positions(q),
            None if k is None else group.k.of_positions(k),
        )

    def _is_whole(self, group: Group) -> bool:
        return all(
            pos is None or (pos.shape[1] == len(self.every) and bool((pos == self.every).all()))
            for pos in self._positions(group)
        )

    def _index(self, q_pos: Tensor | None, k_pos: Tensor | None) -> Tensor:
        """Rows of the table, [n, M, N], or [1, M, N] without positions."""
        G = self.call.grid_size
        u_q, u_k = (coordinates(self.every[None] if pos is None else pos, G) for pos in (q_pos, k_pos))
        return u_q[:, :, None] - (u_k[:, None, :] - center(G))

    def _read(self, q_pos: Tensor | None, k_pos: Tensor | None) -> Tensor:
        """[n, H, M, N]."""
        assert self.table_HT is not None
        index = self._index(q_pos, k_pos)
        return self.table_HT.index_select(1, index.flatten()).unflatten(1, index.shape).transpose(0, 1)

    def _scatter(self, q_pos: Tensor | None, k_pos: Tensor | None, ds_nHMN: Tensor) -> None:
        # One row of the transposed table per head and thread: the same order, so the same bits in every run.
        assert self.gradient_HT is not None
        index = self._index(q_pos, k_pos).expand(len(ds_nHMN), -1, -1).flatten()
        values_HS = ds_nHMN.transpose(0, 1).flatten(1)
        self.gradient_HT.scatter_add_(1, index.expand_as(values_HS), values_HS)
