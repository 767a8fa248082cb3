"""What ``torch.compile`` is to leave alone."""

from collections.abc import Callable
from typing import TypeVar, cast

import torch
from torch._compile import _disable_dynamo  # the public form of it imports all of Dynamo
from torch.torch_version import TorchVersion

SETS_ATTRIBUTES = TorchVersion("2.13")
"""From here on Dynamo traces what sets an optimiser's attributes."""
Function = TypeVar("Function", bound=Callable[..., object])


def untraced(function: Function) -> Function:
    """``function``, which torch before 2.13 fails to trace, and then runs as it is."""
    if TorchVersion(torch.__version__) >= SETS_ATTRIBUTES:
        return function
    return cast(Function, _disable_dynamo(function))
