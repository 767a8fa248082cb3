"""Attention on a CPU, a few samples after the other: their scores fit into the cache, a batch's do not.

B samples, H heads, M queries, N keys, d head size, T table rows, G grid side, n samples of a group. q, k, v
and their gradients are [B, H, rows, d] by strides, or, with offsets, [1, H, all rows, d]. Products in the
dtype of q; softmax, sums and the table's gradient in float32 (float64 for float64).
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .call import Call, Side
from .reference import center, coordinates

SCORES_BYTES = 1 << 20
"""A group's scores, at most: about what a core's own cache holds."""


def forward(
    q_BHMd: Tensor, k_BHNd: Tensor, v_BHNd: Tensor, table_RH: Tensor | None, call: Call, out_BHMd: Tensor
) -> Tensor:
    """Write ``out``; returns log(sum(exp(score))) [H, all rows of q]."""
    lse = q_BHMd.new_empty(q_BHMd.shape[1], q_BHMd.shape[0] * q_BHMd.shape[2], dtype=_wide(q_BHMd))
    biases = Biases(table_RH, call, q_BHMd)
    for group in _groups(q_BHMd, k_BHNd, call):
        out_nHMd = group.q.of(out_BHMd)
        if not group.q.length or not group.k.length:
            out_nHMd.zero_()
            continue
        q, k, v = group.q.of(q_BHMd), group.k.of(k_BHNd), group.k.of(v_BHNd)
        mask = biases.of(group)
        out, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, attn_mask=None if mask is None else mask.to(q.dtype), scale=call.scale
        )
        out_nHMd.copy_(out)
        group.q.of_all(lse).copy_(sums)
    return lse


def backward(
    dout_BHMd: Tensor,
    q_BHMd: Tensor,
    k_BHNd: Tensor,
    v_BHNd: Tensor,
    table_RH: Tensor | None,
    out_BHMd: Tensor,
    lse: Tensor,
    call: Call,
    dq_BHMd: Tensor,
    dk_BHNd: Tensor,
    dv_BHNd: Tensor,
    dtable_RH: Tensor | None,
) -> None:
    """Write the gradients of q, k, v, and of the table where ``dtable`` is given."""
    biases = Biases(table_RH, call, q_BHMd)
    for group in _groups(q_BHMd, k_BHNd, call):
        dq, dk, dv = group.q.of(dq_BHMd), group.k.of(dk_BHNd), group.k.of(dv_BHNd)
        if not group.q.length or not group.k.length:
            for gradient in (dq, dk, dv):
                gradient.zero_()
            continue
        q, k, v = group.q.of(q_BHMd), group.k.of(k_BHNd), group.k.of(v_BHNd)
        dout, wide, mask = group.q.of(dout_BHMd), lse.dtype, biases.of(group)
        if mask is not None and q.dtype == wide and len(q) == 1:
            p = torch.baddbmm(mask[0], q[0], k[0].transpose(1, 2), alpha=call.scale)[None]
        else:
            p = torch.matmul(q, k.transpose(2, 3)).to(wide).mul_(call.scale)
            p = p if mask is None else p.add_(mask)
        p.sub_(group.q.of_all(lse)[..., None]).exp_()
        delta = (dout.to(wide) * group.q.of(out_BHMd)).sum(-1, keepdim=True)
        ds = torch.matmul(dout, v.transpose(2, 3)).to(wide).sub_(delta).mul_(p)
        if dtable_RH is not None:
            biases.add_gradient(group, ds)
        p, ds = p.to(q.dtype), ds.to(q.dtype)
        torch.mul(torch.matmul(ds, k), call.scale, out=dq)
        torch.mul(torch.matmul(ds.transpose(2, 3), q), call.scale, out=dk)
        dv.copy_(torch.matmul(p.transpose(2, 3), dout))
    if dtable_RH is not None:
        dtable_RH.copy_(biases.gradient())


@dataclass
class Rows:
    """The queries or keys of a group of samples of one length, n in all. ``sample``: the first in the batch;
    ``row``: the first row of all samples' rows."""

    sample: int
    row: int
    count: int
    length: int
    packed: bool
    pos: Tensor | None
    """[n, length]; None: all positions of the grid, in order."""

    def of(self, x_BHRd: Tensor) -> Tensor:
        """A view of theirs: [n, H, length, d]."""
        if not self.packed:
            return x_BHRd[self.sample : self.sample + self.count]
        return self._split(x_BHRd[0])

    def of_all(self, x_HR: Tensor) -> Tensor:
        """A view of theirs among the rows of all: [n, H, length]."""
        return self._split(x_HR)

    def _split(self, x_HR: Tensor) -> Tensor:
        rows = x_HR[:, self.row : self.row + self.count * self.length]
        return rows.unflatten(1, (self.count, self.length)).transpose(0, 1)


@dataclass
class Group:
    q: Rows
    k: Rows


class Biases:
    """The bias of each group, read from the table, and the table's gradient, summed over the groups."""

    def __init__(self, table_RH: Tensor | None, call: Call, like: Tensor):
        self.call = call
        self.table_HT = None if table_RH is None else table_RH.t().to(_wide(like)).contiguous()
        self.every = torch.arange(call.grid_size**2)
        self.whole: Tensor | None = None
        self.whole_gradient: Tensor | None = None
        self.gradient_HT = None if self.table_HT is None else torch.zeros_like(self.table_HT)

    def of(self, group: Group) -> Tensor | None:
        """[n, H, M, N]; in whole grids a view."""
        if self.table_HT is None:
            return None
        if not self._is_whole(group):
            return self._read(group.q.pos, group.k.pos)
        if self.whole is None:
            self.whole = self._read(None, None)
        return self.whole.expand(group.q.count, -1, -1, -1)

    def add_gradient(self, group: Group, ds_nHMN: Tensor) -> None:
        if not self._is_whole(group):
            self._scatter(group.q.pos, group.k.pos, ds_nHMN)
        elif self.whole_gradient is None:
            self.whole_gradient = ds_nHMN.sum(0)
        else:
            self.whole_gradient.add_(ds_nHMN.sum(0))

    def gradient(self) -> Tensor:
        """[T, H]."""
        assert self.gradient_HT is not None
        if self.whole_gradient is not None:
            self._scatter(None, None, self.whole_gradient[None])
        return self.gradient_HT.t()

    def _is_whole(self, group: Group) -> bool:
        return all(
            pos is None or (pos.shape[1] == len(self.every) and bool((pos == self.every).all()))
            for pos in (group.q.pos, group.k.pos)
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


def _groups(q_BHMd: Tensor, k_BHNd: Tensor, call: Call) -> Iterator[Group]:
    """Samples in order; those that follow each other in one group have equal lengths, and scores within
    ``SCORES_BYTES``, unless it is one sample."""
    queries, keys = _lengths(call.queries, q_BHMd), _lengths(call.keys, k_BHNd)
    first, row_q, row_k = 0, 0, 0
    for (M, N), same in itertools.groupby(zip(queries, keys, strict=True)):
        left = sum(1 for _ in same)
        bytes_of_one = max(1, q_BHMd.shape[1] * M * N * _wide(q_BHMd).itemsize)
        while left:
            n = min(left, max(1, SCORES_BYTES // bytes_of_one))
            yield Group(_rows(call.queries, first, row_q, n, M), _rows(call.keys, first, row_k, n, N))
            first, row_q, row_k, left = first + n, row_q + n * M, row_k + n * N, left - n


def _lengths(side: Side, x_BHRd: Tensor) -> list[int]:
    if side.offsets is None:
        return [x_BHRd.shape[2]] * x_BHRd.shape[0]
    return side.offsets.diff().tolist()


def _rows(side: Side, sample: int, row: int, count: int, length: int) -> Rows:
    pos = side.pos
    if pos is not None:
        pos = pos[sample : sample + count] if side.offsets is None else pos[row : row + count * length]
        pos = pos.reshape(count, length)
    return Rows(sample, row, count, length, side.offsets is not None, pos)


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
