"""Tokens of all samples as one matrix of rows, the layout of most kernels. R rows, D or O numbers each."""

from torch import Tensor


def as_rows(x: Tensor) -> Tensor:
    """``x`` [..., D] as contiguous rows [R, D]."""
    return in_rows(x).contiguous()


def in_rows(x: Tensor) -> Tensor:
    """``x`` [..., D] as rows [R, D], contiguous or not."""
    return x if x.ndim == 2 else x.flatten(0, -2) if x.ndim > 2 else x[None]


def as_before(rows: Tensor, x: Tensor) -> Tensor:
    """``rows`` [R, O], computed from ``x`` [..., D], in the leading shape of ``x``: [..., O]."""
    return rows if x.ndim == 2 else rows.view(*x.shape[:-1], rows.shape[-1])
