"""Tokens of all samples one after the other, as most kernels take them. R rows, D or O numbers each."""

from torch import Tensor


def as_rows(x: Tensor) -> Tensor:
    """``x`` [..., D] as rows [R, D], side by side in memory."""
    return in_rows(x).contiguous()


def in_rows(x: Tensor) -> Tensor:
    """``x`` [..., D] as rows [R, D], wherever they lie."""
    return x if x.ndim == 2 else x.flatten(0, -2) if x.ndim > 2 else x[None]


def as_before(rows: Tensor, x: Tensor) -> Tensor:
    """``rows`` [R, O] in the shape of the ``x`` [..., D] that they were made of: [..., O]."""
    return rows if x.ndim == 2 else rows.view(*x.shape[:-1], rows.shape[-1])
