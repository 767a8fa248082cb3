"""The forward pass by flash-attn 4, with a ``score_mod`` that reads the table. Imported only when it serves.

B samples, H heads, M queries, N keys, R rows (tokens of all samples), T rows of the table, d head size.
"""

import importlib
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..registry import registered
from . import reference
from .call import Call, Side


def attend(q: Tensor, k: Tensor, v: Tensor, table_RH: Tensor, call: Call) -> Tensor:
    """q [B, H, M, d] (or [R, H, d]) -> like q. No gradients."""
    if not call.ragged:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    queries, keys = call.queries, call.keys
    u_q = _coordinates(queries, call.grid_size, q.device) + reference.center(call.grid_size)
    u_k = _coordinates(keys, call.grid_size, q.device)
    table_HT = table_RH.t().float().contiguous()
    out = rel_attention_flash_attn_4(
        q, k, v, table_HT, u_q, u_k, queries.offsets, keys.offsets, queries.length, keys.length, call.scale
    )
    return out if call.ragged else out.transpose(1, 2)


@registered("mdt_fast::rel_attention_flash_attn_4")
def rel_attention_flash_attn_4(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table_HT: Tensor,
    u_q: Tensor,
    u_k: Tensor,
    q_offsets: Tensor | None,
    k_offsets: Tensor | None,
    max_q: int,
    max_k: int,
    scale: float,
) -> Tensor:
    """q is [B, M, H, d] with u_q [B * M], or [R, H, d] with u_q [R] and offsets; k, v and u_k likewise.

    Returns a tensor like q. ``table`` is float32, and ``u_q - u_k`` (int32) is its row.
    """
    library: Any = importlib.import_module("flash_attn.cute")
    batched, ragged = _score_mods()
    aux = [u_q, u_k, table_HT]
    if q_offsets is None:
        out = library.flash_attn_func(q, k, v, softmax_scale=scale, score_mod=batched, aux_tensors=aux)
    else:
        out = library.flash_attn_varlen_func(
            q, k, v, cu_seqlens_q=q_offsets, cu_seqlens_k=k_offsets, max_seqlen_q=max_q, max_seqlen_k=max_k,
            softmax_scale=scale, score_mod=ragged, aux_tensors=aux,
        )  # fmt: skip
    result: Tensor = out[0] if isinstance(out, tuple) else out
    return result


@rel_attention_flash_attn_4.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, table_HT: Tensor, u_q: Tensor, u_k: Tensor, q_offsets: Tensor | None,
    k_offsets: Tensor | None, max_q: int, max_k: int, scale: float,
) -> Tensor:  # fmt: skip
    return q.new_empty(q.shape)


def _coordinates(side: Side, grid_size: int, device: torch.device) -> Tensor:
    """[B * length] or [R]: one dimension, so that the layout is the same for all sizes."""
    pos = side.pos
    if pos is None:
        pos = torch.arange(grid_size**2, device=device).expand(side.batch, -1)
    return reference.coordinates(pos, grid_size).flatten().int()


@cache
def _score_mods() -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The ``score_mod`` for uniform and for ragged batches. Scores and indices are one-element vectors."""
    cutlass: Any = importlib.import_module("cutlass")
    cute: Any = importlib.import_module("cutlass.cute")

    @cute.jit
    def batched(
        score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any, seqlen_info: Any, aux_tensors: Any
    ) -> Any:
        u_q, u_k, table = aux_tensors
        row = u_q[b[0] * seqlen_info.seqlen_q + q_idx[0]] - u_k[b[0] * seqlen_info.seqlen_k + kv_idx[0]]
        bias = cute.make_rmem_tensor(1, cutlass.Float32)
        bias[0] = table[h[0], row]
        return score + bias.load()

    @cute.jit
    def ragged(
        score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any, seqlen_info: Any, aux_tensors: Any
    ) -> Any:
        u_q, u_k, table = aux_tensors
        row = u_q[seqlen_info.offset_q + q_idx[0]] - u_k[seqlen_info.offset_k + kv_idx[0]]
        bias = cute.make_rmem_tensor(1, cutlass.Float32)
        bias[0] = table[h[0], row]
        return score + bias.load()

    return batched, ragged
