"""Plain PyTorch, any device and dtype. L tokens, D width, O output width, P numbers per patch."""

from collections.abc import Callable
from functools import reduce
from operator import add

import torch.nn.functional as F
from torch import Tensor

from ..checks import plain_only

Product = Callable[..., Tensor]
"""A function that multiplies, with the signature of ``F.linear``."""


def skip_linear(x: Tensor, skip: Tensor, weight: Tensor, bias: Tensor, product: Product = F.linear) -> Tensor:
    weight_x, weight_skip = weight.chunk(2, dim=1)
    return _sum(product(x, weight_x, bias), product(skip, weight_skip))


def patch_skip_linear(
    x_BLD: Tensor,
    patches_BLP: Tensor,
    embed_weight_DP: Tensor,
    embed_bias_D: Tensor,
    pos_1LD: Tensor,
    weight: Tensor,
    bias: Tensor,
    product: Product = F.linear,
) -> Tensor:
    weight_x, weight_skip = weight.chunk(2, dim=1)
    thin_OP = weight_skip @ embed_weight_DP
    shared_1LO = F.linear(embed_bias_D + pos_1LD, weight_skip, bias)  # the same for every sample
    return _sum(product(x_BLD, weight_x), F.linear(patches_BLP, thin_OP), shared_1LO)


def _sum(first: Tensor, *others: Tensor) -> Tensor:
    """Add up into ``first``; out of place under torch.func, whose transforms may have made others larger."""
    if plain_only():
        return reduce(add, others, first)
    for other in others:
        first.add_(other)
    return first
