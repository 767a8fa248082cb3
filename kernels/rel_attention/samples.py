"""Attention on a CPU, one sample after the other: a sample's scores fit into the cache, a batch's do not.

B samples, H heads, M queries, N keys, d head size, T table rows, G grid side. q, k, v and their gradients are
[B, H, rows, d] by strides, or, with offsets, [1, H, all rows, d]. Products in the dtype of q; softmax, sums
and the table's gradient in float32 (float64 for float64).
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .call import Call, Side
from .reference import center, coordinates


def forward(
    q_BHMd: Tensor, k_BHNd: Tensor, v_BHNd: Tensor, table_RH: Tensor | None, call: Call, out_BHMd: Tensor
) -> Tensor:
    """Write ``out``; returns log(sum(exp(score))) [H, all rows of q]."""
    lse = q_BHMd.new_empty(q_BHMd.shape[1], q_BHMd.shape[0] * q_BHMd.shape[2], dtype=_wide(q_BHMd))
    biases = Biases(table_RH, call, q_BHMd)
    for sample in _samples(q_BHMd, k_BHNd, call):
        if not sample.keys or not sample.queries:
            out_BHMd[sample.q] = 0
            continue
        q, k, v = q_BHMd[sample.q][None], k_BHNd[sample.k][None], v_BHNd[sample.k][None]
        mask = biases.of(sample)
        out, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, attn_mask=None if mask is None else mask[None].to(q.dtype), scale=call.scale
        )
        out_BHMd[sample.q] = out[0]
        lse[:, sample.rows] = sums[0]
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
    for sample in _samples(q_BHMd, k_BHNd, call):
        if not sample.keys or not sample.queries:
            dq_BHMd[sample.q], dk_BHNd[sample.k], dv_BHNd[sample.k] = 0, 0, 0
            continue
        q, k, v, dout = q_BHMd[sample.q], k_BHNd[sample.k], v_BHNd[sample.k], dout_BHMd[sample.q]
        wide, mask = lse.dtype, biases.of(sample)
        if mask is not None and q.dtype == wide:
            p = torch.baddbmm(mask, q, k.transpose(1, 2), alpha=call.scale)
        else:
            p = torch.bmm(q, k.transpose(1, 2)).to(wide).mul_(call.scale)
            p = p if mask is None else p.add_(mask)
        p.sub_(lse[:, sample.rows, None]).exp_()
        delta = (dout.to(wide) * out_BHMd[sample.q]).sum(-1, keepdim=True)
        ds = torch.bmm(dout, v.transpose(1, 2)).to(wide).sub_(delta).mul_(p)
        if dtable_RH is not None:
            biases.add_gradient(sample, ds)
        p, ds = p.to(q.dtype), ds.to(q.dtype)
        torch.mul(torch.bmm(ds, k), call.scale, out=dq_BHMd[sample.q])
        torch.mul(torch.bmm(ds.transpose(1, 2), q), call.scale, out=dk_BHNd[sample.k])
        dv_BHNd[sample.k] = torch.bmm(p.transpose(1, 2), dout)
    if dtable_RH is not None:
        dtable_RH.copy_(biases.gradient())


@dataclass
class Sample:
    """Where one sample stands: ``q`` and ``k`` index [B, H, rows, d], ``rows`` the queries' rows of all."""

    q: tuple[int, slice, slice]
    k: tuple[int, slice, slice]
    rows: slice
    q_pos: Tensor | None
    k_pos: Tensor | None

    @property
    def queries(self) -> int:
        return self.rows.stop - self.rows.start

    @property
    def keys(self) -> int:
        return self.k[2].stop - self.k[2].start


class Biases:
    """The bias of each sample, read from the table, and the table's gradient, summed over the samples."""

    def __init__(self, table_RH: Tensor | None, call: Call, like: Tensor):
        self.call = call
        self.table_HT = None if table_RH is None else table_RH.t().to(_wide(like)).contiguous()
        self.every = torch.arange(call.grid_size**2)
        self.whole: Tensor | None = None
        self.whole_gradient: Tensor | None = None
        self.gradient_HT = None if self.table_HT is None else torch.zeros_like(self.table_HT)

    def of(self, sample: Sample) -> Tensor | None:
        """[H, M, N]."""
        if self.table_HT is None:
            return None
        if not self._is_whole(sample):
            return self._read(sample.q_pos, sample.k_pos)
        if self.whole is None:
            self.whole = self._read(None, None)
        return self.whole

    def add_gradient(self, sample: Sample, ds_HMN: Tensor) -> None:
        if not self._is_whole(sample):
            self._scatter(sample.q_pos, sample.k_pos, ds_HMN)
        elif self.whole_gradient is None:
            self.whole_gradient = ds_HMN.clone()
        else:
            self.whole_gradient.add_(ds_HMN)

    def gradient(self) -> Tensor:
        """[T, H]."""
        assert self.gradient_HT is not None
        if self.whole_gradient is not None:
            self._scatter(None, None, self.whole_gradient)
        return self.gradient_HT.t()

    def _is_whole(self, sample: Sample) -> bool:
        return all(pos is None or torch.equal(pos, self.every) for pos in (sample.q_pos, sample.k_pos))

    def _index(self, q_pos: Tensor | None, k_pos: Tensor | None) -> Tensor:
        G = self.call.grid_size
        u_q, u_k = (coordinates(self.every if pos is None else pos, G) for pos in (q_pos, k_pos))
        return u_q[:, None] - (u_k[None, :] - center(G))

    def _read(self, q_pos: Tensor | None, k_pos: Tensor | None) -> Tensor:
        assert self.table_HT is not None
        index = self._index(q_pos, k_pos)
        return self.table_HT.index_select(1, index.flatten()).view(len(self.table_HT), *index.shape)

    def _scatter(self, q_pos: Tensor | None, k_pos: Tensor | None, ds_HMN: Tensor) -> None:
        # A row of the table per head and thread: the same order, so the same bits, in every run.
        assert self.gradient_HT is not None
        index = self._index(q_pos, k_pos).flatten().expand(len(ds_HMN), -1)
        self.gradient_HT.scatter_add_(1, index, ds_HMN.flatten(1))


def _samples(q_BHMd: Tensor, k_BHNd: Tensor, call: Call) -> Iterator[Sample]:
    queries, keys, every = _rows(call.queries, q_BHMd), _rows(call.keys, k_BHNd), slice(None)
    for (at_q, here_q, rows, q_pos), (at_k, here_k, _, k_pos) in zip(queries, keys, strict=True):
        yield Sample((at_q, every, here_q), (at_k, every, here_k), rows, q_pos, k_pos)


def _rows(side: Side, x_BHRd: Tensor) -> Iterator[tuple[int, slice, slice, Tensor | None]]:
    """For each sample: its place in the batch, its rows there, its rows of all, and their positions."""
    if side.offsets is None:
        L = x_BHRd.shape[2]
        for b in range(x_BHRd.shape[0]):
            yield b, slice(0, L), slice(b * L, b * L + L), None if side.pos is None else side.pos[b]
        return
    offsets = side.offsets.tolist()
    for start, end in itertools.pairwise(offsets):
        rows = slice(start, end)
        yield 0, rows, rows, None if side.pos is None else side.pos[rows]


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
