"""A model whose passes without gradients are CUDA graphs, for the published sampling loops and others."""

import warnings
from collections.abc import Callable, Sequence, Sized
from functools import wraps
from inspect import ismethod, signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.modules import module as hooks_of_all

from ..cuda_graphs import WARM_UP, Graphed, Numbers, key_of
from ..errors import UserError
from .base import Transformer
from .own import OURS, home, is_wrapped, keeps

METHODS = "forward", "forward_with_cfg"
OWN = "model", "numbers", "names", "graphs", "plain", "warm_up"
MOST = 16
"""Most captures per model; after that, new arguments run the model without a graph."""
LONG = 10
"""Fewest steps of a loop for which a capture pays; a capture takes as long as two steps."""
PLAIN = 2
"""A loop's first steps, which run without a graph: kernels are compiled in them."""


class GraphedModel:
    """``model``, with ``forward`` (call this object) and ``forward_with_cfg`` as one CUDA graph launch each.

    For loops other than :func:`mdt_fast.sample`, which does more than this: with few images, launching the
    kernels one by one takes longer than running them. Each new combination of tensor shapes and other
    arguments is captured when it first occurs (``graphs``). All other attributes (``in_channels``,
    ``eval()``) are the model's.

    The model runs without a graph if it is not on a GPU, in training mode, with gradients enabled, with a
    mask, and if its weights are sharded by FSDP or not plain tensors.

    New values in the weights and replaced weights take effect. Changes around the layers after a capture
    (hooks, switches, adapters) do not. Raises ``UserError`` for a model that is not this package's.
    """

    def __init__(self, model: Transformer):
        if not isinstance(model, Transformer):
            raise UserError(f"model: got a {type(model).__name__}, expected this package's models")
        self.model, self.numbers = model, Numbers(model)
        self.names = {name: _names(getattr(type(model), name)) for name in METHODS}
        self.graphs: dict[Any, Graphed] = {}
        self.plain = True
        self.warm_up = WARM_UP

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """Call ``model(x, t, y)``."""
        return self._run(self.model.__call__, "forward", args, kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self(*args, **kwargs)

    def forward_with_cfg(self, *args: Any, **kwargs: Any) -> Tensor:
        """As the model's; ``cfg_scale`` may be a tensor [n] if it changes from step to step."""
        return self._run(self.model.forward_with_cfg, "forward_with_cfg", args, kwargs)

    def in_a_loop(self, method: Callable[..., Tensor], calls: int) -> Callable[..., Tensor]:
        """As the model's; ``method``, this object or one of its methods, runs as graphs already."""
        return _with_its_dtype(self.model, method)

    def __getattr__(self, name: str) -> Any:
        if name == "model":  # a copy that is still being made
            raise AttributeError(name)
        value = getattr(self.model, name)
        return self._chained(value) if ismethod(value) else value

    def __setattr__(self, name: str, value: Any) -> None:
        if name in OWN:
            super().__setattr__(name, value)
        else:
            setattr(self.model, name, value)

    def _chained(self, method: Callable[..., Any]) -> Callable[..., Any]:
        """The model's ``method``, returning this object in place of the model: ``eval()``, ``cuda()``."""

        @wraps(method)
        def call(*args: Any, **kwargs: Any) -> Any:
            result = method(*args, **kwargs)
            return self if result is self.model else result

        return call

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "graphs": {}}  # a copy captures its own graphs

    def _run(self, call: Callable[..., Tensor], name: str, args: Any, kwargs: Any) -> Tensor:
        given = self._given(self.names[name], args, kwargs)
        masked = given is not None and given.get("enable_mask", False) is not False
        if given is None or masked or not self._goes(list(given.values())):
            return call(*args, **kwargs)
        autocast = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
        tensors = {key: value for key, value in given.items() if isinstance(value, Tensor)}
        rest = {key: value for key, value in given.items() if key not in tensors}
        key, inputs = (name, *tensors, *rest.items(), autocast), list(tensors.values())
        graph = self.graphs.get(key)
        captured = graph is not None and key_of(inputs) in graph.captured
        if not captured and sum(len(each.captured) for each in self.graphs.values()) >= MOST:
            return call(*args, **kwargs)
        if graph is None:
            function = _of_tensors(call, [*tensors], rest, autocast)
            first = next(iter(self.graphs.values()), None)
            graph = Graphed(function, inputs[0].device, beside=first, warm_up=self.warm_up)
        output = graph(*inputs).clone()
        self.graphs[key] = graph
        return output

    def _given(
        self, names: Sequence[str], args: Sequence[Any], kwargs: dict[str, Any]
    ) -> dict[str, Any] | None:
        """The arguments by name, in the order of ``names``; None if there are any others."""
        given = {**dict(zip(names, args)), **kwargs}
        if len(given) < len(args) + len(kwargs) or not given.keys() <= set(names):
            return None
        return {name: given[name] for name in names if name in given}

    def _goes(self, values: Sequence[Any]) -> bool:
        """Whether a graph does the same as the model: all arguments must be tensors on the GPU, numbers or
        None. Masks and label drops, which are requested by True, are drawn on the host."""
        if torch.is_grad_enabled() or self.model.training or torch.compiler.is_compiling():
            return False
        tensors = [value for value in values if isinstance(value, Tensor)]
        plain = (isinstance(value, Tensor | int | float | None) and value is not True for value in values)
        if not tensors or not all(plain) or not all(on_a_gpu(each) and each.ndim for each in tensors):
            return False
        if self.numbers.moved():
            self.graphs.clear()
            shards = any(isinstance(module, FSDPModule) for module in self.model.modules())
            self.plain = not shards and all(at or not x.numel() for x, at, _ in self.numbers.before)
        return self.plain


def in_a_loop(model: Transformer, method: Callable[..., Tensor], calls: int) -> Callable[..., Tensor]:
    """Prepare ``method`` (``model`` itself or one of its methods) for a loop that calls it ``calls`` times.
    On a GPU it runs as graphs from the third call on, if all of its code is this package's: a graph must not
    bypass what a user put around layers (hooks, modules, another forward, ``torch.compile``)."""
    name = "forward" if method is model else getattr(method, "__name__", "")
    if calls >= LONG and on_a_gpu(next(model.parameters())) and _ours(model, method, name):
        method = _InALoop(model, method, name)
    return _with_its_dtype(model, method)


def _with_its_dtype(model: Transformer, method: Callable[..., Tensor]) -> Callable[..., Tensor]:
    half = model.pos_embed.dtype in (torch.bfloat16, torch.float16)
    return _InItsDtype(model, method) if half else method


class _OfAModel:
    """A callable in place of a model, with all of the model's attributes."""

    model: Transformer

    def __getattr__(self, name: str) -> Any:
        if name == "model":  # a copy that is still being made
            raise AttributeError(name)
        return getattr(self.model, name)


class _InItsDtype(_OfAModel):
    """``method`` of a model in half precision; casts x to the model's dtype."""

    def __init__(self, model: Transformer, method: Callable[..., Tensor]):
        self.model, self.method = model, method

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.method(x.to(self.model.pos_embed.dtype), *args, **kwargs)


class _InALoop(_OfAModel):
    """A method of ``model`` over many calls: unchanged at first, as graphs from the third call on. It stays
    unchanged if the GPU is still busy with the second call when the third comes (launching is then not the
    bottleneck), if nothing can be captured, and as soon as a layer gets a hook or is replaced."""

    def __init__(self, model: Transformer, method: Callable[..., Tensor], name: str):
        self.model, self.method, self.name, self.calls = model, method, name, 0
        self.quick: GraphedModel | None = GraphedModel(model)
        self.quick.warm_up = 1
        self.last: torch.cuda.Event
        self.modules = [*model.modules()]
        self.tables: list[Sized] = [
            *(vars(module) for module in self.modules),
            *(each for m in self.modules for each in (m._forward_hooks, m._forward_pre_hooks)),
            hooks_of_all._global_forward_hooks,
            hooks_of_all._global_forward_pre_hooks,
        ]
        self.captured_of: tuple[Any, ...] = ()

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        self.calls += 1
        if self.calls <= PLAIN:
            output = self.method(*args, **kwargs)
            self.last = mark(output)
            return output
        if self.calls == PLAIN + 1:
            self.captured_of = self._parts()
            if not self.last.query() or not _ours(self.model, self.method, self.name):
                self.quick = None
        elif self.quick is not None and self.captured_of != self._parts():
            self.quick = None
        if self.quick is None:
            return self.method(*args, **kwargs)
        try:
            graphed: Callable[..., Tensor] = getattr(self.quick, self.name)
            return graphed(*args, **kwargs)
        except (UserError, torch.OutOfMemoryError) as error:
            reason = str(error).partition(chr(10))[0]
        self.quick = None
        output = self.method(*args, **kwargs)
        warnings.warn(f"sampling without CUDA graphs, its steps launched one by one: {reason}", stacklevel=2)
        return output

    def _parts(self) -> tuple[Any, ...]:
        """What changes if a layer gets a hook or another method, or is replaced."""
        return sum(map(len, self.tables)), [each for m in self.modules for each in m._modules.values()]


def _ours(model: Transformer, method: Callable[..., Tensor], name: str) -> bool:
    """Whether ``method`` and all that it calls is this package's and PyTorch's, and nothing observes it: no
    subclass's method, no hooks, nothing compiled, no counter of operations, no other graph."""
    if name not in METHODS or method not in (model, getattr(model, name)):
        return False
    if not keeps(model, name, "forward"):
        return False
    if torch._C._len_torch_dispatch_stack() or torch.cuda.is_current_stream_capturing():
        return False
    if hooks_of_all._global_forward_hooks or hooks_of_all._global_forward_pre_hooks:
        return False
    return all(map(_plain, model.modules()))


def _plain(module: nn.Module) -> bool:
    homes = {home(type(module)), home(type(module).forward)}
    own = any(map(callable, vars(module).values()))
    return homes <= {"torch", OURS} and not own and not is_wrapped(module)


def mark(output: Tensor) -> torch.cuda.Event:
    """Record an event after the computation of ``output``."""
    with torch.cuda.device(output.device):
        event = torch.cuda.Event()
        event.record()
    return event


def on_a_gpu(tensor: Tensor) -> bool:
    return tensor.is_cuda


def _names(function: Callable[..., Any]) -> list[str]:
    """A method's argument names in order, except a training step's; none with ``*args`` or ``**kwargs``."""
    _, *parameters = signature(function).parameters.values()
    if any(each.kind in (each.VAR_POSITIONAL, each.VAR_KEYWORD) for each in parameters):
        return []
    return [each.name for each in parameters if each.name not in ("x_masked", "y_masked")]


def _of_tensors(
    call: Callable[..., Tensor],
    names: Sequence[str],
    rest: dict[str, Any],
    autocast: tuple[bool, torch.dtype],
) -> Callable[..., Tensor]:
    """``call`` as a function of the tensors with these names."""

    def function(*tensors: Tensor) -> Tensor:
        # Casts cached by autocast would be gone when the graph is replayed.
        with torch.autocast("cuda", enabled=autocast[0], dtype=autocast[1], cache_enabled=False):
            return call(**dict(zip(names, tensors, strict=True)), **rest)

    return function
