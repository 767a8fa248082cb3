"""Kernel functions as PyTorch operators ``mdt_fast::...``.

Everything that looks at operators sees one: ``torch.compile``, fake tensors, selective checkpointing, FLOP
counters. Eager code does not need the dispatcher, which takes longer than many kernels. There, calling an op
calls its function directly, and the profiler sees only the kernels.
"""

import sys
from collections.abc import Callable
from functools import wraps
from importlib import import_module
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

R = TypeVar("R")

PLAIN = (Tensor, torch.nn.Parameter)
"""Types whose memory is what it appears to be; a subclass may be a shard, or have no memory."""

_FUNC, _VMAP, _TRACER = map(
    torch._C._dispatch_key_parse, ("FuncTorchDynamicLayerFrontMode", "VmapMode", "Tracer")
)
_included, modes = torch._C._dispatch_tls_is_dispatch_key_included, torch._C._len_torch_dispatch_stack


class Op(Generic[R]):
    """``function``, registered as ``name``; see :func:`registered`."""

    def __init__(self, name: str, function: Callable[..., R]) -> None:
        self.function, self.name = on_their_device(function), name
        schema = torch.library.infer_schema(function, mutates_args=())
        torch.library.define(name, schema, tags=[torch.Tag.pt2_compliant_tag])
        torch.library.impl(name, "CompositeExplicitAutograd")(_disable_dynamo(self.function))
        namespace, _, op = name.partition("::")
        self.overload = getattr(getattr(torch.ops, namespace), op).default
        self.formula: type[torch.autograd.Function] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> R:
        if torch.compiler.is_compiling() or kwargs:
            return self.overload(*args, **kwargs)
        gradients = needs_grad(args)
        if gradients and self.formula is None:
            raise RuntimeError(f"{self.name}: has no derivative")
        if watched(args):
            _give_formulas()
            return self.overload(*args)
        return self.formula.apply(*args) if gradients and self.formula else self.function(*args)

    def within(self, ctx: Any) -> Callable[..., R]:
        """What to call in the forward pass of an autograd function with this context: the function itself if
        :func:`applied` has found that nothing looks at operators, else the op."""
        return self.function if without_gradients(ctx) else self

    def register_fake(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Register the function that makes outputs of the right shapes from fake tensors."""
        torch.library.register_fake(self.name)(function)
        return function

    def register_autograd(self, backward: Callable[..., Any], *, setup_context: Callable[..., None]) -> None:
        """As ``torch.library.register_autograd``, for both the operator and its function. There is no second
        derivative; asking for one raises an error."""
        backward = once(backward)
        torch.library.register_autograd(self.name, backward, setup_context=setup_context)

        def forward(ctx: Any, *args: Any) -> Any:
            output = self.function(*args)
            setup_context(ctx, args, output)
            return output

        methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
        self.formula = type(self.name.replace("::", "_"), (torch.autograd.Function,), methods)


def _give_formulas() -> None:
    """Let a FLOP counter that looks at operators know those of this package."""
    if modes() and "torch.utils.flop_counter" in sys.modules:
        import_module(".flops", __package__).counted()


def registered(name: str) -> Callable[[Callable[..., R]], Op[R]]:
    """Register the decorated function, which must not change its arguments, as the operator ``name``.

    Its annotations are the schema (``torch.library.infer_schema``). On plain tensors, and if nothing looks at
    operators, a call runs the function directly.
    """
    return lambda function: Op(name, function)


def on_their_device(function: Callable[..., R]) -> Callable[..., R]:
    """``function`` with the GPU of its tensors as the current device, on which Triton launches kernels."""

    @wraps(function)
    def run(*args: Any) -> R:
        for arg in args:
            if isinstance(arg, Tensor):
                if not arg.is_cuda or arg.device.index == torch.cuda.current_device():
                    break
                with torch.cuda.device(arg.device):
                    return function(*args)
        return function(*args)

    return run


def once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A backward pass that cannot be differentiated.

    An attempt raises an error and never gives a gradient that lacks this function's part, as PyTorch's
    ``once_differentiable`` does if the incoming gradient is constant.
    """

    @wraps(backward)
    def run(ctx: Any, *gradients: Any) -> Any:
        again = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        ctx = _ReadOnce(ctx) if again else ctx
        with torch.no_grad():
            results = backward(ctx, *gradients)
        if not again:
            return results
        several = results if isinstance(results, tuple) else (results,)
        given = [x for x in several if isinstance(x, Tensor)]
        # They must also depend on their sources: autograd skips what the requested inputs do not reach.
        sources = [x for x in (*ctx.saved_tensors, *gradients) if isinstance(x, Tensor) and x.requires_grad]
        once_alone = iter(_OnceAlone.apply(len(given), *(sources or [_nowhere()]), *given))
        return tuple(next(once_alone) if isinstance(x, Tensor) else x for x in several)

    return run


class _ReadOnce:
    """An autograd context that reads its saved tensors only once, as checkpointing requires."""

    def __init__(self, ctx: Any) -> None:
        self._ctx = ctx

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._ctx, name)
        if name == "saved_tensors":
            self.saved_tensors = value
        return value


class _OnceAlone(torch.autograd.Function):
    """Returns the last ``number`` tensors; differentiating them with respect to any of the inputs raises."""

    @staticmethod
    def forward(ctx: Any, number: int, *tensors: Tensor) -> Any:
        return tuple(x.detach() for x in tensors[len(tensors) - number :])

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise RuntimeError(
            "mdt_fast: there is no second derivative of its kernels; the models of mdt_fast.reference have "
            "one, and so have these under torch.func"
        )


def _nowhere() -> Tensor:
    """A tensor that requires a gradient and that nothing else refers to."""
    return torch.empty(0, requires_grad=True)


class _Nothing:
    """Replaces an autograd context if no gradient will be asked for."""

    needs_input_grad: tuple[bool, ...] = ()

    def save_for_backward(self, *tensors: Tensor | None) -> None: ...

    def set_materialize_grads(self, value: bool) -> None: ...


def without_gradients(ctx: Any) -> bool:
    """Whether :func:`applied` has found that no gradient is asked for, and nothing looks at operators."""
    return type(ctx) is _Nothing


def applied(function: type[torch.autograd.Function], *args: Any) -> Any:
    """``function.apply(*args)``; in eager code without gradients, only the forward pass."""
    if torch.compiler.is_compiling() or needs_grad(args):
        return function.apply(*args)
    if watched(args):
        # An autograd context does not know that gradients are off. A weight rounded to float8 (a tuple) has
        # none, so it must: its tensors are detached. Others stay as they are, for what is watching.
        if any(isinstance(arg, tuple) for arg in args):
            args = tuple(arg.detach() if isinstance(arg, Tensor) else arg for arg in args)
        return function.apply(*args)
    return function.forward(_Nothing(), *args)


def watched(args: tuple[Any, ...]) -> bool:
    """Whether anything looks at operators here, or an argument's memory does not hold its values: a dispatch
    mode, a transform of torch.func, a tracer, a subclass, the meta device, a lazy negation."""
    if modes() or _included(_FUNC) or _included(_VMAP) or _included(_TRACER):
        return True
    for arg in args:
        if type(arg) in PLAIN:
            if arg.is_meta or arg.is_neg() or arg._is_zerotensor():
                return True
        elif isinstance(arg, Tensor):
            return True
    return False


def needs_grad(args: tuple[Any, ...]) -> bool:
    """Whether a gradient is needed for any of these arguments."""
    if torch.is_grad_enabled():
        for arg in args:
            if isinstance(arg, Tensor) and arg.requires_grad:
                return True
    return False
