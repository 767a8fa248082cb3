"""FLOP formulas of the registered attention ops; import :mod:`mdt_fast.kernels.flops` to use them.

The backward pass is credited with the four products that its gradients need, as torch counts attention
written as products; the scores that the kernels compute again are not counted.
"""

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry, register_flop_formula

from ..registry import PLAIN
from . import registered as registered  # registers the ops


def _product(queries: int, q_offsets: Tensor | None, keys: int, k_offsets: Tensor | None, batch: int) -> int:
    """The number of scores of one head. A ragged batch has those of its true lengths if the offsets can be
    read (which waits for a GPU), else those of the bounds ``queries`` and ``keys``."""
    if q_offsets is None or k_offsets is None:
        return batch * queries * keys
    unreadable = any(type(x) not in PLAIN or x.is_meta for x in (q_offsets, k_offsets))
    if unreadable or (q_offsets.is_cuda and torch.cuda.is_current_stream_capturing()):
        return (len(q_offsets) - 1) * queries * keys
    return int((q_offsets.diff().long() * k_offsets.diff().long()).sum())


def _separate(q, k, q_offsets, k_offsets, max_q, max_k):  # type: ignore[no-untyped-def]
    B, H, M, d = q.shape
    M, N = (M, k.shape[2]) if q_offsets is None else (max_q, max_k)
    return 2 * H * d * _product(M, q_offsets, N, k_offsets, B)


def _packed(qkv, offsets, max_length):  # type: ignore[no-untyped-def]
    B, L, _, H, d = qkv.shape
    L = L if offsets is None else max_length
    return 2 * H * d * _product(L, offsets, L, offsets, B)


@register_flop_formula(torch.ops.mdt_fast.rel_attention, get_raw=True)
def _(q, k, v, table, q_pos, k_pos, q_offsets, k_offsets, max_q, max_k, *_, **__):  # type: ignore[no-untyped-def]
    return 2 * _separate(q, k, q_offsets, k_offsets, max_q, max_k)


@register_flop_formula(torch.ops.mdt_fast.rel_attention_bwd, get_raw=True)
def _(  # type: ignore[no-untyped-def]
    dout, q, k, v, table, q_pos, k_pos, q_offsets, k_offsets, out, lse, max_q, max_k, *_, **__
):
    return 4 * _separate(q, k, q_offsets, k_offsets, max_q, max_k)


@register_flop_formula(torch.ops.mdt_fast.rel_attention_qkvpacked, get_raw=True)
def _(qkv, table, pos, offsets, max_length, *_, **__):  # type: ignore[no-untyped-def]
    return 2 * _packed(qkv, offsets, max_length)


@register_flop_formula(torch.ops.mdt_fast.rel_attention_qkvpacked_bwd, get_raw=True)
def _(dout, qkv, table, pos, offsets, out, lse, max_length, *_, **__):  # type: ignore[no-untyped-def]
    return 4 * _packed(qkv, offsets, max_length)


def _sdpa(q_shape, k_shape, *_, **__):  # type: ignore[no-untyped-def]
    B, H, M, d = q_shape
    return 2 * 2 * B * H * M * k_shape[2] * d


def _sdpa_bwd(dout_shape, q_shape, k_shape, *_, **__):  # type: ignore[no-untyped-def]
    return 2 * _sdpa(q_shape, k_shape)


for name, formula in (("", _sdpa), ("_backward", _sdpa_bwd)):  # torch's own ops, for which it has none
    op = getattr(torch.ops.aten, f"_scaled_dot_product_flash_attention_for_cpu{name}")
    if op not in flop_registry:
        register_flop_formula(op)(formula)
