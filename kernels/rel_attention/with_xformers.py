"""Attention by xformers' ``memory_efficient_attention``, with the bias materialised, and with gradients.

Written from the source of xformers 0.0.35, whose wheel on PyPI needs the CUDA 12 runtime to load.
"""

from functools import cache
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import Tensor

from . import reference
from .call import Call

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
NEWEST = (9, 0)
"""The newest compute capability that its kernel with a bias supports."""


def _version() -> str | None:
    try:
        return version("xformers")
    except PackageNotFoundError:
        return None


VERSION = _version()  # every call reads it


def installed() -> str | None:
    """The installed version, or None."""
    return VERSION


@cache
def built() -> bool:
    """Whether it has CUDA kernels that load here; a wheel has them for one version of torch and CUDA."""
    try:
        from xformers import _cpp_lib
        from xformers.ops.fmha import cutlass

        # The kernel is PyTorch's own, but xformers uses it only if its extension was loaded.
        return bool(cutlass.FwOp.is_available() and _cpp_lib._built_with_cuda)
    except (ImportError, AttributeError, OSError, RuntimeError):
        return False


def refusal(q: Tensor, table_RH: Tensor | None, call: Call, needs_grad: bool) -> str | None:
    if installed() is None:
        return "xformers is not installed (pip install xformers)"
    if not q.is_cuda or q.dtype not in DTYPES:
        return f"it needs a CUDA device and float32, float16 or bfloat16; got {q.dtype} on {q.device}"
    if not built():
        return (
            f"xformers {installed()} has no CUDA kernels for this torch (python -m xformers.info says more)"
        )
    gpu = torch.cuda.get_device_properties(q.device)
    return limits(q, table_RH, call, needs_grad, (gpu.major, gpu.minor))


def limits(
    q: Tensor, table_RH: Tensor | None, call: Call, needs_grad: bool, capability: tuple[int, int]
) -> str | None:
    """The reason why it cannot serve the call on a GPU of this compute capability, or None."""
    if call.ragged:
        return "samples of different lengths (q_offsets); pad them, or take triton or sdpa"
    multiple = 16 // q.element_size()
    if q.shape[-1] % multiple:
        return f"head size {q.shape[-1]}, it takes multiples of {multiple} in {q.dtype}"
    if table_RH is not None and capability > NEWEST:
        major, minor = capability
        return f"it takes a bias up to compute capability 9.0, this GPU has {major}.{minor}"
    if needs_grad and table_RH is not None and table_RH.requires_grad and not q.requires_grad:
        return "the table needs a gradient and q does not: xformers would give none"
    return None


def attend(q: Tensor, k: Tensor, v: Tensor, table_RH: Tensor | None, call: Call) -> Tensor:
    if not q.numel() or not k.numel():
        return reference.rel_attention(q, k, v, table_RH, call)
    from xformers.ops import memory_efficient_attention

    bias = None
    if table_RH is not None:
        bias = reference.bias_mask(q, table_RH, call, call.queries.pos, call.keys.pos, multiple=8)
    out = memory_efficient_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), attn_bias=bias, scale=call.scale
    )
    return out.transpose(1, 2)
