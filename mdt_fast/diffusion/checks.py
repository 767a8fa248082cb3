"""What argument checks share."""

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


def readable(tensor: Tensor) -> bool:
    """Whether a check may read the values of ``tensor``: reading from a GPU would wait for it, and there are
    none under ``torch.compile`` and in fake tensors."""
    cpu = tensor.device.type == "cpu"
    return cpu and not torch.compiler.is_compiling() and not isinstance(tensor, FakeTensor)
