"""The rooms' functions as operators ``mdt_fast::...`` of PyTorch.

What looks at operators sees one: ``torch.compile``, fake tensors, checkpointing by operator, counters of
FLOPs. Eager code has no use for the way through the dispatcher, which takes longer than many a kernel: there
an op is a call of its function.
"""

from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.autograd.function import once_differentiable

R = TypeVar("R")

PLAIN = (Tensor, torch.nn.Parameter)
"""Whose memory is what it seems to be; a subclass may be a shard, or have none."""

_FUNC, _VMAP, _TRACER = map(
    torch._C._dispatch_key_parse, ("FuncTorchDynamicLayerFrontMode", "VmapMode", "Tracer")
)


class Op(Generic[R]):
    """``function``, registered as ``name``; see :func:`registered`."""

    def __init__(self, name: str, function: Callable[..., R]) -> None:
        self.function, self.name = function, name
        schema = torch.library.infer_schema(function, mutates_args=())
        torch.library.define(name, schema, tags=[torch.Tag.pt2_compliant_tag])
        torch.library.impl(name, "CompositeExplicitAutograd")(_disable_dynamo(function))
        namespace, _, op = name.partition("::")
        self.overload = getattr(getattr(torch.ops, namespace), op).default
        self.formula: type[torch.autograd.Function] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> R:
        if torch.compiler.is_compiling() or kwargs or watched(args):
            return self.overload(*args, **kwargs)
        if not needs_grad(args):
            return self.function(*args)
        if self.formula is None:
            raise RuntimeError(f"{self.name}: has no derivative (where it is one, there is no second)")
        return self.formula.apply(*args)

    def register_fake(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """What the outputs look like, from tensors without numbers."""
        torch.library.register_fake(self.name)(function)
        return function

    def register_autograd(self, backward: Callable[..., Any], *, setup_context: Callable[..., None]) -> None:
        """As ``torch.library.register_autograd``, for the operator and for its function."""
        torch.library.register_autograd(self.name, backward, setup_context=setup_context)
        run = self.function

        class Formula(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, *args: Any) -> Any:
                output = run(*args)
                setup_context(ctx, args, output)
                return output

            @staticmethod
            @once_differentiable
            def backward(ctx: Any, *gradients: Any) -> Any:
                return backward(ctx, *gradients)

        Formula.__name__ = self.name.replace("::", "_")
        self.formula = Formula


def registered(name: str) -> Callable[[Callable[..., R]], Op[R]]:
    """Register the function below, which changes none of its arguments, as the operator ``name``.

    Its annotations are the schema (``torch.library.infer_schema``). Called on plain tensors where nothing
    looks at operators, it is the function itself.
    """
    return lambda function: Op(name, function)


class _Nothing:
    """In place of an autograd context where no gradient will be asked for."""

    def save_for_backward(self, *tensors: Tensor | None) -> None: ...

    def set_materialize_grads(self, value: bool) -> None: ...


def applied(function: type[torch.autograd.Function], *args: Any) -> Any:
    """``function.apply(*args)``; of eager code without gradients the forward pass alone."""
    if torch.compiler.is_compiling() or needs_grad(args) or watched(args):
        return function.apply(*args)
    return function.forward(_Nothing(), *args)


def watched(args: tuple[Any, ...]) -> bool:
    """Whether anything looks at operators here, or there are no numbers: a mode, a transform of torch.func, a
    tracer, a subclass, the meta device."""
    included = torch._C._dispatch_tls_is_dispatch_key_included
    if torch._C._len_torch_dispatch_stack() or included(_FUNC) or included(_VMAP) or included(_TRACER):
        return True
    for arg in args:
        if type(arg) in PLAIN:
            if arg.is_meta:
                return True
        elif isinstance(arg, Tensor):
            return True
    return False


def needs_grad(args: tuple[Any, ...]) -> bool:
    """Whether the gradient of one of these is asked for."""
    if torch.is_grad_enabled():
        for arg in args:
            if isinstance(arg, Tensor) and arg.requires_grad:
                return True
    return False
