"""Attention on a CPU by ``csrc/``: one head of one sample at a time, in blocks of queries, with float32 sums.

B samples, H heads, M queries, N keys, d head size, T table rows, G grid side. q, k, v and their gradients are
strided [B, H, rows, d], or [1, H, all rows, d] with offsets.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..checks import cast
from ..last import of_the_last
from ..native import CPU
from .call import Call, Side
from .reference import center, coordinates


def forward(
    q_BHMd: Tensor,
    k_BHNd: Tensor,
    v_BHNd: Tensor,
    table_TH: Tensor | None,
    call: Call,
    out_BHMd: Tensor,
    lse: Tensor,
) -> None:
    """Write ``out``, and log(sum(exp(score))) into ``lse`` [H, all rows of q]."""
    CPU.rel_attention_fwd(q_BHMd, k_BHNd, v_BHNd, _table(table_TH), *_rest(table_TH, call), out_BHMd, lse)


def backward(
    dout_BHMd: Tensor,
    q_BHMd: Tensor,
    k_BHNd: Tensor,
    v_BHNd: Tensor,
    table_TH: Tensor | None,
    lse: Tensor,
    call: Call,
    dq_BHMd: Tensor,
    dk_BHNd: Tensor,
    dv_BHNd: Tensor,
    dtable_TH: Tensor | None,
) -> None:
    """Write the gradients of q, k and v, and that of the table if ``dtable`` (initially zeros) is given."""
    sums_TH = dtable_TH
    if sums_TH is not None and (sums_TH.dtype != torch.float32 or not sums_TH.is_contiguous()):
        sums_TH = torch.zeros(sums_TH.shape, dtype=torch.float32, device="cpu")
    CPU.rel_attention_bwd(
        dout_BHMd, q_BHMd, k_BHNd, v_BHNd, _table(table_TH), *_rest(table_TH, call), lse, dq_BHMd, dk_BHNd,
        dv_BHNd, sums_TH,
    )  # fmt: skip
    if dtable_TH is not None and sums_TH is not None and sums_TH is not dtable_TH:
        dtable_TH.copy_(sums_TH)


def _table(table_TH: Tensor | None) -> Tensor | None:
    return None if table_TH is None else cast(table_TH, torch.float32).contiguous()


def _rest(table_TH: Tensor | None, call: Call) -> tuple[Any, ...]:
    """The places of queries and keys, the offsets and the scale. A query's place plus a key's place is a row
    of the table, counted backwards from its last one."""
    places: tuple[Tensor | None, Tensor | None] = None, None
    if table_TH is not None:
        places = _places(call, call.grid_size, len(table_TH) - 1)
    return *places, call.queries.offsets, call.keys.offsets, call.scale


def _places(call: Call, G: int, last: int) -> tuple[Tensor, Tensor]:
    """The places of queries, which include the table's ``last`` row, and of keys."""
    of_queries, of_keys = _placed(call.queries.pos, call.keys.pos, G, last)
    return _laid_out(of_queries, call.queries), _laid_out(of_keys, call.keys)


def _laid_out(places: Tensor, side: Side) -> Tensor:
    """int32 [B, length], or [1, R] with offsets."""
    if side.pos is None:
        return places.expand(side.batch, -1)
    return places if side.offsets is None else places[None]


@of_the_last
def _placed(q_pos: Tensor | None, k_pos: Tensor | None, G: int, last: int) -> tuple[Tensor, Tensor]:
    """Places from positions; None means the whole grid in order."""
    u, v = (_whole(G) if pos is None else coordinates(pos, G) for pos in (q_pos, k_pos))
    return (last - center(G) - u).int(), v.int()


@cache
def _whole(G: int) -> Tensor:
    return coordinates(torch.arange(G * G, device="cpu"), G)
