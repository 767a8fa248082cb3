"""Split the samples of a batch into groups that are computed together.

H heads, M queries, N keys, n samples of a group.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .call import Call, Side


@dataclass
class Rows:
    """The queries or keys of a group of ``count`` samples of one ``length``.

    ``sample`` is the index of the first sample in the batch, ``row`` the index of its first row among all
    rows.
    """

    sample: int
    row: int
    count: int
    length: int
    packed: bool

    def of(self, x_BHRd: Tensor) -> Tensor:
        """The group's part of ``x`` as a view [n, H, length, d]."""
        if not self.packed:
            return x_BHRd[self.sample : self.sample + self.count]
        return self._split(x_BHRd[0])

    def of_all(self, x_HR: Tensor) -> Tensor:
        """The group's part of ``x`` [H, all rows] as a view [n, H, length]."""
        return self._split(x_HR)

    def of_positions(self, x: Tensor) -> Tensor:
        """The group's part of ``x``, which is shaped like the positions, [B, length] or [R]: [n, length]."""
        if not self.packed:
            return x[self.sample : self.sample + self.count]
        return x[self.row : self.row + self.count * self.length].unflatten(0, (self.count, self.length))

    def _split(self, x_HR: Tensor) -> Tensor:
        rows = x_HR[:, self.row : self.row + self.count * self.length]
        return rows.unflatten(1, (self.count, self.length)).transpose(0, 1)


@dataclass
class Group:
    q: Rows
    k: Rows


def wide(x: Tensor) -> torch.dtype:
    """The dtype of scores and sums."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def groups(q_BHMd: Tensor, k_BHNd: Tensor, call: Call, scores_bytes: int) -> Iterator[Group]:
    """Groups of consecutive samples of equal lengths, in order; a group's scores take at most
    ``scores_bytes``, unless it is a single sample."""
    queries, keys = _lengths(call.queries, q_BHMd), _lengths(call.keys, k_BHNd)
    first, row_q, row_k = 0, 0, 0
    for (M, N), same in itertools.groupby(zip(queries, keys, strict=True)):
        left = sum(1 for _ in same)
        bytes_of_one = max(1, q_BHMd.shape[1] * M * N * wide(q_BHMd).itemsize)
        while left:
            n = min(left, max(1, scores_bytes // bytes_of_one))
            q = Rows(first, row_q, n, M, call.queries.offsets is not None)
            yield Group(q, Rows(first, row_k, n, N, call.keys.offsets is not None))
            first, row_q, row_k, left = first + n, row_q + n * M, row_k + n * N, left - n


def _lengths(side: Side, x_BHRd: Tensor) -> list[int]:
    if side.offsets is None:
        return [x_BHRd.shape[2]] * x_BHRd.shape[0]
    return side.offsets.diff().tolist()
