"""Whether a class, a method or a module is this package's own, as it was written, or a user's.

The classes themselves are registered here by :func:`known`, and none is imported.
"""

from typing import Any, TypeGuard, TypeVar

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass as is_wrapper

from ..kernels.registry import PLAIN

OURS = __name__.partition(".")[0]
Kind = TypeVar("Kind", bound=type[nn.Module])
FORWARDS: dict[type[nn.Module], Any] = {
    cls: cls.forward for cls in (nn.Linear, nn.Conv2d, nn.Sequential, nn.SiLU)
}
"""The forward methods as they are defined, to notice if someone replaces one in its class."""


def known(cls: Kind) -> Kind:
    """Add a class of this package to ``FORWARDS``. It also stands for a class there that it derives from, so
    its forward pass must compute the same."""
    FORWARDS[cls] = cls.forward
    return cls


def home(thing: Any) -> str:
    """The top-level package that a class or function is from, such as "torch"; "" for a function around
    another, which has only the name of its module."""
    module = None if hasattr(thing, "__wrapped__") else getattr(thing, "__module__", None)
    return (module or "").partition(".")[0]


def is_ours(thing: Any) -> bool:
    """Whether a class or function is this package's, and not one around it."""
    return home(thing) == OURS


def keeps(module: nn.Module, *methods: str) -> bool:
    """Whether those of ``methods`` that the class of ``module`` has are this package's, in the class and on
    the module."""
    cls, own = type(module), vars(module)
    theirs = [name for name in methods if hasattr(cls, name) and not is_ours(getattr(cls, name))]
    return not theirs and own.keys().isdisjoint(methods)


def is_watched(module: nn.Module) -> bool:
    """Whether something sees or changes what ``module`` is called with or returns: hooks on its forward pass,
    or a ``forward`` set on the module. Its class may be anyone's."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


def is_wrapped(module: nn.Module) -> bool:
    """Whether ``module`` :func:`is_watched` or is compiled by itself."""
    return is_watched(module) or module._compiled_call_impl is not None


def is_itself(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether calling ``module`` runs exactly the forward pass of ``kind``: no subclass (except float8's), no
    hooks, not compiled by itself, no ``forward`` replaced on the module or in its class."""
    own, cls = vars(module), type(module)  # attributes of a module are slow, and a block checks eight layers
    if cls is not kind and not (cls in FORWARDS and issubclass(cls, kind)):
        return False
    hooked = own["_forward_hooks"] or own["_forward_pre_hooks"]
    hooked = hooked or own["_backward_hooks"] or own["_backward_pre_hooks"]
    hooked = hooked or own.get("_compiled_call_impl") is not None  # by module.compile()
    return not hooked and "forward" not in own and cls.forward is FORWARDS[cls]


def takes_ours(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether ``module`` runs the forward pass of ``kind`` with arguments that nobody else sees or changes.

    Unlike one that :func:`is_itself`, it may be of a subclass with the same ``forward``, be compiled, have
    hooks that see its output, or be sharded by FSDP, whose hook before the forward pass changes no values.
    """
    own, cls = vars(module), type(module)
    if cls.forward is not FORWARDS[kind] or "forward" in own:
        return False
    before = own["_forward_pre_hooks"]
    if before and not (isinstance(module, FSDPModule) and len(before) == 1):
        return False
    return not (own["_backward_hooks"] or own["_backward_pre_hooks"])


def is_readable(weight: Tensor) -> bool:
    """Whether ``weight`` is one tensor of numbers, or a shard of one, and does not wrap others."""
    return type(weight) in PLAIN or isinstance(weight, DTensor) or not is_wrapper(weight)


def plain_parameters(
    layer: nn.Module, kind: type[nn.Module] = nn.Linear
) -> tuple[nn.Parameter, nn.Parameter] | None:
    """Weight and bias of a linear layer (or convolution) if they fully describe it. None if it has hooks or
    another module or function in its place (torchao's float8, adapters), whose forward must run, or if its
    weight wraps other tensors (torchao's values and scales), which only a whole product can read."""
    if not is_itself(layer, kind):
        return None
    parameters = vars(layer)["_parameters"]
    weight, bias = parameters.get("weight"), parameters.get("bias")
    if weight is None or bias is None:  # FSDP1 keeps both as attributes
        weight, bias = layer.weight, layer.bias
    return (weight, bias) if bias is not None and is_readable(weight) else None


def is_plain(layer: nn.Module, kind: type[nn.Module] = nn.Linear) -> TypeGuard[nn.Linear]:
    """Whether ``layer`` has :func:`plain_parameters`."""
    return plain_parameters(layer, kind) is not None
