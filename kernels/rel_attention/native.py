"""Attention on a CPU by ``csrc/``: one head of one sample after the other, in blocks of queries.
Sums are in float32.

B samples, H heads, M queries, N keys, d head size, T table rows, G grid side. q, k, v and their gradients are
[B, H, rows, d] by strides, or, with offsets, [1, H, all rows, d].
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..checks import cast
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
    """Write ``out``, and into ``lse`` [H, all rows of q] log(sum(exp(score)))."""
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
    """Write the gradients of q, k, v, and of the table into zeros ``dtable`` where they are given."""
    sums_TH = dtable_TH
    if sums_TH is not None and (sums_TH.dtype != torch.float32 or not sums_TH.is_contiguous()):
        sums_TH = torch.zeros(sums_TH.shape, device="cpu")
    CPU.rel_attention_bwd(
        dout_BHMd, q_BHMd, k_BHNd, v_BHNd, _table(table_TH), *_rest(table_TH, call), lse, dq_BHMd, dk_BHNd,
        dv_BHNd, sums_TH,
    )  # fmt: skip
    if dtable_TH is not None and sums_TH is not None and sums_TH is not dtable_TH:
        dtable_TH.copy_(sums_TH)


def _table(table_TH: Tensor | None) -> Tensor | None:
    return None if table_TH is None else cast(table_TH, torch.float32).contiguous()


def _rest(table_TH: Tensor | None, call: Call) -> tuple[Any, ...]:
    """The places of queries and keys, whose sums are rows of the table from its last one; offsets; scale."""
    places: tuple[Tensor | None, Tensor | None] = None, None
    if table_TH is not None:
        G, last = call.grid_size, len(table_TH) - 1
        places = _places(call.queries, G, last), _places(call.keys, G)
    return *places, call.queries.offsets, call.keys.offsets, call.scale


def _places(side: Side, G: int, last: int | None = None) -> Tensor:
    """int32 [B, length], or [1, R] with offsets; of queries, with the table's ``last`` row."""
    if side.pos is None:
        return _whole(G, last).expand(side.batch, -1)
    places = _placed(side.pos, G, last)
    return places if side.offsets is None else places[None]


def _placed(positions: Tensor, G: int, last: int | None) -> Tensor:
    u = coordinates(positions, G)
    return (u if last is None else last - center(G) - u).int()


@cache
def _whole(G: int, last: int | None) -> Tensor:
    """Of all positions of a grid in order."""
    return _placed(torch.arange(G * G, device="cpu"), G, last)
