"""Functions that ``torch.compile`` must not trace."""

from collections.abc import Callable
from typing import TypeVar, cast

import torch
from torch._compile import _disable_dynamo  # its public form imports all of Dynamo
from torch.torch_version import TorchVersion

SETS_ATTRIBUTES = TorchVersion("2.13")
"""The first version whose Dynamo can trace code that sets an optimiser's attributes."""
Function = TypeVar("Function", bound=Callable[..., object])


def untraced(function: Function) -> Function:
    """``function``, which runs eagerly in torch before 2.13, as those versions fail to trace it."""
    if TorchVersion(torch.__version__) >= SETS_ATTRIBUTES:
        return function
    return cast(Function, _disable_dynamo(function))
