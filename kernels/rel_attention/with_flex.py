"""Attention by PyTorch's FlexAttention, with a ``score_mod`` that reads the table.

On CUDA it is compiled, and its gradient of the table is summed by atomics: not the same bits in every run. On
the CPU it has no gradients, and runs as plain PyTorch.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from . import reference
from .call import Call


def refusal(q: Tensor, table_RH: Tensor | None, call: Call, needs_grad: bool) -> str | None:
    if call.ragged:
        return "samples of different lengths (q_offsets); pad them, or take triton or sdpa"
    if not q.is_cuda and needs_grad:
        return f"FlexAttention has no gradients on {q.device.type}"
    return None


def attend(q: Tensor, k: Tensor, v: Tensor, table_RH: Tensor | None, call: Call) -> Tensor:
    if not q.numel() or not k.numel():
        return reference.rel_attention(q, k, v, table_RH, call)
    score_mod = None if table_RH is None else _score_mod(table_RH, call, q.device)
    return _attention(q.is_cuda)(q, k, v, score_mod=score_mod, scale=call.scale)


@cache
def _attention(compiled: bool) -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    attention: Callable[..., Any] = flex_attention
    return torch.compile(attention) if compiled else attention


def _score_mod(table_RH: Tensor, call: Call, device: torch.device) -> Callable[..., Tensor]:
    G = call.grid_size
    u = [_coordinate(side.pos, G, device) for side in (call.queries, call.keys)]
    q_each, k_each = (side.pos is not None for side in (call.queries, call.keys))

    def score_mod(score: Tensor, b: Tensor, h: Tensor, m: Tensor, n: Tensor) -> Tensor:
        u_q = u[0][b, m] if q_each else u[0][m]
        u_k = u[1][b, n] if k_each else u[1][n]
        return score + table_RH[u_q - u_k + 2 * G * (G - 1), h]

    return score_mod


def _coordinate(pos: Tensor | None, G: int, device: torch.device) -> Tensor:
    every = torch.arange(G * G, device=device) if pos is None else pos
    return every // G * (2 * G - 1) + every % G
