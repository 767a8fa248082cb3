"""Plain PyTorch, any device and dtype."""

import torch.nn.functional as F
from torch import Tensor

from ..checks import cast


def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    return cast(F.gelu(x + bias, approximate="tanh"), x.dtype)
