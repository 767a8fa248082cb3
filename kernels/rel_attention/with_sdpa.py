"""Attention by PyTorch's ``scaled_dot_product_attention``, with the bias spelt out as its mask."""

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from . import reference
from .call import Call

# Not cuDNN, whose gradients with a mask have been wrong in some versions. With a mask EFFICIENT serves, with
# float64 MATH.
PINNED = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def refusal(q: Tensor, table_RH: Tensor | None, call: Call, needs_grad: bool) -> str | None:
    """It serves every device and dtype."""
    return None


def attend(q: Tensor, k: Tensor, v: Tensor, table_RH: Tensor | None, call: Call) -> Tensor:
    if not q.is_cuda:
        return reference.rel_attention(q, k, v, table_RH, call)
    with sdpa_kernel(PINNED):
        return reference.rel_attention(q, k, v, table_RH, call)


def installed() -> str:
    """Its version."""
    return torch.__version__
