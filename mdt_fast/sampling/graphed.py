"""A model whose passes without gradients are CUDA graphs, for a sampling loop of one's own."""

from collections.abc import Callable, Sequence
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from ..cuda_graphs import Graphed
from ..errors import UserError
from ..models.base import Transformer

METHODS = "forward", "forward_with_cfg"
MOST = 16
"""Graphs of different arguments that are no tensors; for further ones the model is called as it is."""


class GraphedModel:
    """``model`` with its ``forward`` (by calling this) and ``forward_with_cfg`` as one launch each.

    For loops that are not :func:`mdt_fast.sample`, which does more than this: launched one by one, the
    kernels of few images take less time than launching them. Each shape of the tensors, and each other
    argument, is captured when it is first met. Everything else (``in_channels``, ``eval()``) is the model's.
    Off a GPU, in training mode, with gradients asked for, and with a mask the model itself is called.

    Weights may be changed in place between two calls, or be in other memory; what is changed around the
    layers (hooks, switches, precisions) after a capture is not seen: make a new one. Raises ``UserError`` for
    another model than this package's.
    """

    def __init__(self, model: Transformer):
        if not isinstance(model, Transformer):
            raise UserError(f"model: got a {type(model).__name__}, allowed are this package's models")
        self.model = model
        self.names = {name: [*signature(getattr(model, name)).parameters] for name in METHODS}
        self.graphs: dict[Any, Graphed] = {}
        self.addresses: list[int] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """As ``model(x, t, y)``."""
        return self._run(self.model.__call__, "forward", args, kwargs)

    def forward_with_cfg(self, *args: Any, **kwargs: Any) -> Tensor:
        """As the model's; ``cfg_scale`` may be a tensor [n] where it changes from step to step."""
        return self._run(self.model.forward_with_cfg, "forward_with_cfg", args, kwargs)

    def __getattr__(self, name: str) -> Any:
        if name == "model":  # of a copy that is being made
            raise AttributeError(name)
        return getattr(self.model, name)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "graphs": {}, "addresses": []}  # a copy captures its own

    def _run(self, call: Callable[..., Tensor], name: str, args: Any, kwargs: Any) -> Tensor:
        given = {**dict(zip(self.names[name], args)), **kwargs}
        if len(given) < len(args) + len(kwargs) or not self._goes([*given.values()]):
            return call(*args, **kwargs)
        self._follow()
        autocast = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
        tensors = {name: value for name, value in given.items() if isinstance(value, Tensor)}
        rest = {name: value for name, value in given.items() if name not in tensors}
        key = name, *tensors, *((name, type(value), value) for name, value in rest.items()), autocast
        if key not in self.graphs:
            if len(self.graphs) >= MOST:
                return call(*args, **kwargs)
            function = _of_tensors(call, [*tensors], rest, autocast)
            self.graphs[key] = Graphed(function, next(iter(tensors.values())).device)
        return self.graphs[key](*tensors.values()).clone()

    def _goes(self, values: Sequence[Any]) -> bool:
        """Whether a graph does the same: of tensors on the GPU, and of numbers and None alone, as masks and
        label drops, which are asked for by True, are drawn on the host."""
        if torch.is_grad_enabled() or self.model.training or torch.compiler.is_compiling():
            return False
        tensors = [value for value in values if isinstance(value, Tensor)]
        plain = (isinstance(v, Tensor | int | float | None) and v is not True for v in values)
        return bool(tensors) and all(plain) and all(on_a_gpu(each) and each.ndim for each in tensors)

    def _follow(self) -> None:
        """None of the graphs that read weights where they are no more."""
        before, self.addresses = self.addresses, [weight.data_ptr() for weight in self.model.parameters()]
        if self.addresses != before:
            self.graphs.clear()


def on_a_gpu(tensor: Tensor) -> bool:
    return tensor.is_cuda


def _of_tensors(
    call: Callable[..., Tensor],
    names: Sequence[str],
    rest: dict[str, Any],
    autocast: tuple[bool, torch.dtype],
) -> Callable[..., Tensor]:
    """``call`` as a function of the tensors with these names."""

    def function(*tensors: Tensor) -> Tensor:
        # Casts that autocast keeps would be gone when the graph is replayed.
        with torch.autocast("cuda", enabled=autocast[0], dtype=autocast[1], cache_enabled=False):
            return call(**dict(zip(names, tensors, strict=True)), **rest)

    return function
