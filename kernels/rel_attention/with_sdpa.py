"""Attention by PyTorch's ``scaled_dot_product_attention``, with the bias materialised as its mask."""

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..checks import exporting, plain_only
from . import reference
from .call import Call

# FLASH serves calls without a mask, EFFICIENT those with one, and MATH the rest (float64, head sizes that are
# not a multiple of 8). Never cuDNN: in some versions its gradients with a mask were wrong or NaN.
PINNED = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def refusal(q: Tensor, table_RH: Tensor | None, call: Call, needs_grad: bool) -> str | None:
    """It serves every device and dtype."""
    return None


def attend(q: Tensor, k: Tensor, v: Tensor, table_RH: Tensor | None, call: Call) -> Tensor:
    if plain_only() and not exporting():
        with sdpa_kernel(SDPBackend.MATH):  # the others lack derivatives there, or those of the bias
            return reference.rel_attention(q, k, v, table_RH, call)
    if not q.is_cuda:
        return reference.rel_attention(q, k, v, table_RH, call)
    return _pinned(q, k, v, table_RH, call)


def _pinned(q: Tensor, k: Tensor, v: Tensor, table_RH: Tensor | None, call: Call) -> Tensor:
    # When only the mask needs a gradient, EFFICIENT has read invalid memory.
    heads_need_grad = q.requires_grad or k.requires_grad or v.requires_grad
    mask_alone = table_RH is not None and table_RH.requires_grad and not heads_need_grad
    q, k, v = (_aligned(x) for x in (q, k, v))
    with sdpa_kernel([SDPBackend.MATH] if mask_alone and torch.is_grad_enabled() else PINNED):
        return reference.rel_attention(q, k, v, table_RH, call)


def _aligned(x: Tensor) -> Tensor:
    """``x``, or a copy if its rows could begin at multiples of 16 bytes but do not: EFFICIENT accepts such
    tensors, but has no kernel for them."""
    size = x.element_size()
    steps = [step for step, n in zip(x.stride()[:-1], x.shape) if n > 1]
    if not torch.compiler.is_compiling():
        steps.append(int(x.storage_offset()))
    if x.shape[-1] * size % 16 == 0 and any(step * size % 16 for step in steps):
        return x.clone(memory_format=torch.contiguous_format)
    return x


def installed() -> str:
    """PyTorch's version."""
    return torch.__version__
