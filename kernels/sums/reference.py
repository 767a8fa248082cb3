"""Plain PyTorch, any device and dtype."""

import torch
from torch import Tensor


def sum_rows(x_RD: Tensor, dtype: torch.dtype) -> Tensor:
    # float16 could overflow. bfloat16 is rounded as in a layer's gradient; a CPU does that without a copy.
    return x_RD.sum(0, dtype=dtype) if x_RD.dtype == torch.float16 else x_RD.sum(0).to(dtype)
