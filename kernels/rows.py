"""Tokens of all samples one after the other, as most kernels take them. R rows, D or O numbers each."""

from math import prod

from torch import Tensor


def as_rows(x: Tensor) -> Tensor:
    """``x`` [..., D] as rows [R, D], side by side in memory."""
    return (x if x.ndim == 2 else x.reshape(prod(x.shape[:-1]), x.shape[-1])).contiguous()


def as_before(rows: Tensor, x: Tensor) -> Tensor:
    """``rows`` [R, O] in the shape of the ``x`` [..., D] that they were made of: [..., O]."""
    return rows if x.ndim == 2 else rows.view(*x.shape[:-1], rows.shape[-1])
