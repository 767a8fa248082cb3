"""Attention by PyTorch's FlexAttention, with a ``score_mod`` that reads the table.

On CUDA it is compiled and sums the table's gradient with atomics, so its bits can differ between runs. On the
CPU it has no gradients and runs as plain PyTorch. The compiled form has run on an H200.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..checks import exporting, plain_only
from . import reference
from .call import Call, Side

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SMALLEST = 16
"""The smallest head size that the compiled form supports."""
VARIANTS = 64
"""Most compiled variants in one process. PyTorch's 8 are too few: dtypes, gradients, one length or many, and
models multiply."""


def refusal(q: Tensor, table_RH: Tensor | None, call: Call, needs_grad: bool) -> str | None:
    if call.ragged:
        return "samples of different lengths (q_offsets); pad them, or take triton or sdpa"
    if plain_only() and not exporting():
        return "it cannot be transformed by torch.func, nor differentiated forwards"
    return limits(q, needs_grad, q.device.type)


def limits(q: Tensor, needs_grad: bool, device: str) -> str | None:
    """The reason why it cannot serve the call on a device of this type, or None."""
    if device != "cuda":
        return f"FlexAttention has no gradients on {device}" if needs_grad else None
    if q.dtype not in DTYPES:
        return f"on CUDA it takes float32, float16 or bfloat16; got {q.dtype}"
    if q.shape[-1] < SMALLEST:
        return f"head size {q.shape[-1]}, on CUDA it takes {SMALLEST} or more"
    return None


def attend(q: Tensor, k: Tensor, v: Tensor, table_RH: Tensor | None, call: Call) -> Tensor:
    if not q.numel() or not k.numel():
        return reference.rel_attention(q, k, v, table_RH, call)
    if not q.is_cuda:
        q, k, v = (x.detach() for x in (q, k, v))  # even under no_grad it refuses leaves that require grad
    score_mod = None if table_RH is None else _score_mod(table_RH, call, q.device)
    if torch.compiler.is_compiling():
        return _flex_attention()(q, k, v, score_mod=score_mod, scale=call.scale)
    attention = _compiled() if q.is_cuda else _flex_attention()
    with torch._dynamo.config.patch(recompile_limit=VARIANTS):
        out: Tensor = attention(q, k, v, score_mod=score_mod, scale=call.scale)
    return out


def _flex_attention() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return flex_attention


@cache
def _compiled() -> Callable[..., Any]:
    # fullgraph: beyond the limit of variants it raises, instead of silently running uncompiled and slow.
    return torch.compile(_flex_attention(), fullgraph=True)


def _score_mod(table_RH: Tensor, call: Call, device: torch.device) -> Callable[..., Tensor]:
    # All numbers are in tensors: a captured int would be one more reason to recompile.
    u_q = _coordinates(call.queries, call.grid_size, device) + reference.center(call.grid_size)
    u_k = _coordinates(call.keys, call.grid_size, device)

    def score_mod(score: Tensor, b: Tensor, h: Tensor, m: Tensor, n: Tensor) -> Tensor:
        return score + table_RH[u_q[b, m] - u_k[b, n], h]

    return score_mod


def _coordinates(side: Side, grid_size: int, device: torch.device) -> Tensor:
    """[B, length], whether or not positions differ per sample, so that one ``score_mod`` serves both."""
    pos = torch.arange(grid_size**2, device=device) if side.pos is None else side.pos
    return reference.coordinates(pos, grid_size).expand(side.batch, -1).contiguous()
