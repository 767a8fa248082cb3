"""Scores, softmax and what stands between the products of attention on a CPU: by ``csrc/``, or in PyTorch.

n samples of a group, H heads, M queries, N keys, d head size, T table rows, G grid side.
"""

import math

import torch
from torch import Tensor

from .call import Call, Side
from .groups import Group, wide
from .reference import center, coordinates


class NativeScores:
    """One sweep over the scores where they lie, in the dtype of the products."""

    def __init__(self, table_RH: Tensor | None, call: Call, like: Tensor, with_gradient: bool):
        self.call = call
        self.table_HT: Tensor | None = None
        self.memory: dict[str, Tensor] = {}
        if table_RH is not None:
            # A query's place and a key's, added, are a row of the table, whose last row comes first: keys
            # side by side then read rows side by side.
            G = call.grid_size
            self.table_HT = table_RH.flip(0).t().float().contiguous()
            self.q_places = (len(table_RH) - 1 - center(G) - _coordinates(call.queries, G)).int()
            self.k_places = _coordinates(call.keys, G).int()
        self.gradient_HT = (
            None if not with_gradient or self.table_HT is None else torch.zeros_like(self.table_HT)
        )

    def attend(self, group: Group, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> None:
        """Write ``out`` [n, H, M, d] and ``lse`` [n, H, M]."""
        p = self._product("p", self._heads("q", q), self._heads("k", k).mT)
        torch.ops.mdt_fast.attention_softmax_cpu(
            p.flatten(0, 1), self.table_HT, *self._places(group), self.call.scale, lse
        )
        out.copy_(self._product("result", p, self._heads("v", v)).view(out.shape))

    def differentiate(
        self, group: Group, q: Tensor, dout: Tensor, out: Tensor, lse: Tensor, k: Tensor, v: Tensor,
        dq: Tensor, dk: Tensor, dv: Tensor,
    ) -> None:  # fmt: skip
        """Write ``dq`` [n, H, M, d], ``dk`` and ``dv`` [n, H, N, d], and add to the table's gradient."""
        scale = self.call.scale
        q, dout, k, v = (self._heads(*x) for x in (("q", q), ("dout", dout), ("k", k), ("v", v)))
        p, ds = self._product("p", q, k.mT), self._product("ds", dout, v.mT)
        torch.ops.mdt_fast.attention_softmax_bwd_cpu(
            p.flatten(0, 1),
            ds.flatten(0, 1),
            self.table_HT,
            *self._places(group),
            scale,
            lse,
            self.gradient_HT,
        )
        torch.mul(self._product("result", ds, k).view(dq.shape), scale, out=dq)
        torch.mul(self._product("result", ds.mT, q).view(dk.shape), scale, out=dk)
        dv.copy_(self._product("result", p.mT, dout).view(dv.shape))

    def table_gradient(self) -> Tensor:
        """[T, H], of all groups."""
        assert self.gradient_HT is not None
        return self.gradient_HT.t().flip(0)

    def _heads(self, name: str, x_nHRd: Tensor) -> Tensor:
        """[n * H, R, d]: oneDNN, for half types, wants a head's rows together, MKL does not mind."""
        n, H, R, d = x_nHRd.shape
        if x_nHRd.dtype == torch.float32 and n == 1:
            return x_nHRd[0]
        return self._memory(name, x_nHRd, (n, H, R, d)).copy_(x_nHRd).flatten(0, 1)

    def _product(self, name: str, a: Tensor, b: Tensor) -> Tensor:
        return torch.bmm(a, b, out=self._memory(name, a, (len(a), a.shape[1], b.shape[2])))

    def _memory(self, name: str, like: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Memory that the next group takes over: what is new costs a CPU as much as arithmetic."""
        size = math.prod(shape)
        if name not in self.memory or size > len(self.memory[name]):
            self.memory[name] = like.new_empty(size)
        return self.memory[name][:size].view(shape)

    def _places(self, group: Group) -> tuple[Tensor | None, Tensor | None]:
        """Of the group's queries and keys, [n, rows]."""
        if self.table_HT is None:
            return None, None
        return group.q.of_positions(self.q_places), group.k.of_positions(self.k_places)


def _coordinates(side: Side, G: int) -> Tensor:
    """[B, length] or [R]."""
    if side.pos is None:
        return coordinates(torch.arange(G * G), G).expand(side.batch, -1)
    return coordinates(side.pos, G)


class PlainScores:
    """Any dtype, without ``csrc/``. The bias of each group is read from the table."""

    def __init__(self, table_RH: Tensor | None, call: Call, like: Tensor, with_gradient: bool):
        self.call = call
        self.table_HT = None if table_RH is None else table_RH.t().to(wide(like)).contiguous()
        self.every = torch.arange(call.grid_size**2)
        self.whole: Tensor | None = None
        self.whole_gradient: Tensor | None = None
        self.gradient_HT = (
            None if self.table_HT is None or not with_gradient else torch.zeros_like(self.table_HT)
        )

    def attend(self, group: Group, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> None:
        """As :class:`NativeScores`, by PyTorch's fused attention."""
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
        """As :class:`NativeScores`."""
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
        """[T, H], of all groups."""
        assert self.gradient_HT is not None
        if self.whole_gradient is not None:
            self._scatter(None, None, self.whole_gradient[None])
        return self.gradient_HT.t()

    def _bias(self, group: Group) -> Tensor | None:
        """[n, H, M, N]; in whole grids a view."""
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
        """[n, rows]; None: all positions of the grid, in order."""
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
        """Rows of the table, [n, M, N]; without positions [1, M, N]."""
        G = self.call.grid_size
        u_q, u_k = (coordinates(self.every[None] if pos is None else pos, G) for pos in (q_pos, k_pos))
        return u_q[:, :, None] - (u_k[:, None, :] - center(G))

    def _read(self, q_pos: Tensor | None, k_pos: Tensor | None) -> Tensor:
        """[n, H, M, N]."""
        assert self.table_HT is not None
        index = self._index(q_pos, k_pos)
        return self.table_HT.index_select(1, index.flatten()).unflatten(1, index.shape).transpose(0, 1)

    def _scatter(self, q_pos: Tensor | None, k_pos: Tensor | None, ds_nHMN: Tensor) -> None:
        # A row of the table per head and thread: the same order, so the same bits, in every run.
        assert self.gradient_HT is not None
        index = self._index(q_pos, k_pos).expand(len(ds_nHMN), -1, -1).flatten()
        values_HS = ds_nHMN.transpose(0, 1).flatten(1)
        self.gradient_HT.scatter_add_(1, index.expand_as(values_HS), values_HS)
