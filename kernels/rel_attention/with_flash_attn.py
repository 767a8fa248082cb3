"""Attention by flash-attn: 2.x and 3 without a bias (DiT), 4 for the forward pass with a table.

Not run on a GPU yet. The code for version 4 was written from the source of 4.0.0b36 and compiled without a
GPU.
"""

import importlib
import importlib.util
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

from . import reference
from .call import Call

DTYPES = (torch.float16, torch.bfloat16)
NO_TRAINING = (
    "training with a bias table: flash-attn 2 and 3 take no bias; 4 gives a table no gradient, and its "
    "gradient of q is wrong at head size 72 on Hopper. It serves the forward pass alone (torch.no_grad())"
)
GET_4 = "with a bias table it needs flash-attn 4, which is not installed (pip install --pre flash-attn-4)"
GET_2_OR_3 = "flash-attn 2 or 3 is not installed (pip install --no-build-isolation flash-attn)"


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


# Every call reads these. flash-attn 3 is a single module whose distribution name varies.
VERSION_2 = _version("flash-attn")
VERSION_3 = "3" if importlib.util.find_spec("flash_attn_interface") else None
VERSION_4 = _version("flash-attn-4")


def installed() -> str | None:
    """The installed versions, or None."""
    return ", ".join(found for found in (VERSION_2, VERSION_3, VERSION_4) if found) or None


def refusal(q: Tensor, table_RH: Tensor | None, call: Call, needs_grad: bool) -> str | None:
    if table_RH is not None and needs_grad:
        return NO_TRAINING
    if table_RH is not None and VERSION_4 is None:
        return GET_4
    if table_RH is None and VERSION_2 is None and VERSION_3 is None:
        return GET_2_OR_3
    if not q.is_cuda or q.dtype not in DTYPES:
        return f"it needs a CUDA device and float16 or bfloat16; got {q.dtype} on {q.device}"
    gpu = torch.cuda.get_device_properties(q.device)
    return limits(q, table_RH, (gpu.major, gpu.minor))


def limits(q: Tensor, table_RH: Tensor | None, capability: tuple[int, int]) -> str | None:
    """The reason why it cannot serve the call on a GPU of this compute capability, or None."""
    d, (major, minor) = q.shape[-1], capability
    if table_RH is not None:
        if major not in (9, 10):
            return (
                f"a bias table on compute capability {major}.{minor}, it needs 9 (Hopper) or 10 (Blackwell)"
            )
        if d % 8 or d > 128:
            return f"head size {d}, with a bias table it takes multiples of 8 up to 128"
    elif not _takes_3(capability):
        if VERSION_2 is None:
            return f"flash-attn 3 is for compute capability 9.0 (Hopper), this GPU has {major}.{minor}"
        if major < 8:
            return f"flash-attn 2 needs compute capability 8.0 or more, this GPU has {major}.{minor}"
    elif d % 8:
        return f"head size {d}, flash-attn 3 takes multiples of 8"
    return f"head size {d}, it takes at most 256" if d > 256 else None


def attend(q: Tensor, k: Tensor, v: Tensor, table_RH: Tensor | None, call: Call) -> Tensor:
    if not q.numel() or not k.numel():
        return reference.rel_attention(q, k, v, table_RH, call)
    if table_RH is not None:
        from . import with_flash_attn_4

        return with_flash_attn_4.attend(q, k, v, table_RH, call)
    gpu = torch.cuda.get_device_properties(q.device)
    return _without_table(q, k, v, call, _takes_3((gpu.major, gpu.minor)))


def _takes_3(capability: tuple[int, int]) -> bool:
    return VERSION_3 is not None and capability == (9, 0)


def _without_table(q: Tensor, k: Tensor, v: Tensor, call: Call, takes_3: bool) -> Tensor:
    library: Any = importlib.import_module("flash_attn_interface" if takes_3 else "flash_attn")
    if call.ragged:
        queries, keys = call.queries, call.keys
        out = library.flash_attn_varlen_func(
            q, k, v, queries.offsets, keys.offsets, queries.length, keys.length, softmax_scale=call.scale
        )
        return out[0] if isinstance(out, tuple) else out
    out = library.flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v)), softmax_scale=call.scale)
    return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)
