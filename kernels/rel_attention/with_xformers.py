"""Attention by xformers' ``memory_efficient_attention``, with the bias spelt out, gradients included."""

import importlib.util

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference
from .call import Call

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def installed() -> str | None:
    """Its version, or None."""
    if importlib.util.find_spec("xformers") is None:
        return None
    from importlib.metadata import version

    return version("xformers")


def refusal(q: Tensor, table_RH: Tensor | None, call: Call, needs_grad: bool) -> str | None:
    if installed() is None:
        return "xformers is not installed (pip install xformers)"
    if not q.is_cuda or q.dtype not in DTYPES:
        return f"it needs a CUDA device and float32, float16 or bfloat16; got {q.dtype} on {q.device}"
    if call.ragged:
        return "samples of different lengths (q_offsets); pad them, or take triton or sdpa"
    return None


def attend(q: Tensor, k: Tensor, v: Tensor, table_RH: Tensor | None, call: Call) -> Tensor:
    if not q.numel() or not k.numel():
        return reference.rel_attention(q, k, v, table_RH, call)
    from xformers.ops import memory_efficient_attention

    bias = None if table_RH is None else _bias(q, k, table_RH, call)
    out = memory_efficient_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), attn_bias=bias, scale=call.scale
    )
    return out.transpose(1, 2)


def _bias(q: Tensor, k: Tensor, table_RH: Tensor, call: Call) -> Tensor:
    """[B, H, M, N] in the dtype of q, its rows a multiple of 16 bytes apart, as xformers asks."""
    every = torch.arange(call.grid_size**2, device=q.device)
    positions = (every if side.pos is None else side.pos for side in (call.queries, call.keys))
    bias = reference.relative_bias(table_RH, call.grid_size, *positions).to(q.dtype)
    N = k.shape[2]
    return F.pad(bias, (0, -N % 8)).expand(len(q), -1, -1, -1)[..., :N]
