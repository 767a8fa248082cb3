"""Plain PyTorch, any device and dtype. L tokens, D width, O output width, P numbers of a patch."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

Product = Callable[..., Tensor]
"""What multiplies: as ``F.linear``."""


def skip_linear(x: Tensor, skip: Tensor, weight: Tensor, bias: Tensor, product: Product = F.linear) -> Tensor:
    weight_x, weight_skip = weight.chunk(2, dim=1)
    return product(x, weight_x, bias).add_(product(skip, weight_skip))


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
    return product(x_BLD, weight_x).add_(F.linear(patches_BLP, thin_OP)).add_(shared_1LO)
