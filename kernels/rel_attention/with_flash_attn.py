"""Attention without a bias by flash-attn 2.x or 3: for DiT and other models that have no table."""

import importlib.util
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

from .call import Call

DTYPES = (torch.float16, torch.bfloat16)
NO_TABLE = (
    "flash-attn 2 and 3 take no bias; flash-attn 4 gives a bias table no gradient, its gradient of q is "
    "wrong at head size 72 on Hopper, and this version does not call its forward pass"
)


def installed() -> str | None:
    """Its version (3 before 2), or None. flash-attn 4 has another interface, and does not count."""
    if importlib.util.find_spec("flash_attn_interface") is not None:
        return "3"
    try:
        return version("flash-attn")
    except PackageNotFoundError:
        return None


def refusal(q: Tensor, table_RH: Tensor | None, call: Call, needs_grad: bool) -> str | None:
    if table_RH is not None:
        return NO_TABLE
    if installed() is None:
        return "flash-attn is not installed (pip install --no-build-isolation flash-attn)"
    if not q.is_cuda or q.dtype not in DTYPES:
        return f"it needs a CUDA device and float16 or bfloat16; got {q.dtype} on {q.device}"
    return None


def attend(q: Tensor, k: Tensor, v: Tensor, table_RH: Tensor | None, call: Call) -> Tensor:
    library: Any = importlib.import_module("flash_attn_interface" if installed() == "3" else "flash_attn")
    if call.ragged:
        queries, keys = call.queries, call.keys
        out = library.flash_attn_varlen_func(
            q, k, v, queries.offsets, keys.offsets, queries.length, keys.length, softmax_scale=call.scale
        )
        return out[0] if isinstance(out, tuple) else out
    out = library.flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v)), softmax_scale=call.scale)
    return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)
