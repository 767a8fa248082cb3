"""A model whose passes without gradients are CUDA graphs, for a sampling loop of one's own."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..cuda_graphs import Graphed
from ..errors import UserError
from ..models.base import Transformer

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
        self.graphs: dict[Any, Graphed] = {}
        self.addresses: list[int] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """As ``model(x, t, y)``."""
        return self._run(self.model.__call__, args, kwargs)

    def forward_with_cfg(self, *args: Any, **kwargs: Any) -> Tensor:
        """As the model's; ``cfg_scale`` may be a tensor [n] where it changes from step to step."""
        return self._run(self.model.forward_with_cfg, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        if name in ("model", "graphs", "addresses"):  # of a copy that is being made
            raise AttributeError(name)
        return getattr(self.model, name)

    def __getstate__(self) -> dict[str, Any]:
        return {"model": self.model, "graphs": {}, "addresses": []}  # a copy captures its own

    def _run(self, call: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        values = [*args, *kwargs.values()]
        tensors = [value for value in values if isinstance(value, Tensor)]
        rest = [None if isinstance(value, Tensor) else value for value in values]
        if not self._goes(tensors, rest):
            return call(*args, **kwargs)
        self._follow()
        autocast = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
        key = call.__name__, len(args), *kwargs, *map(_written, rest), autocast
        if key not in self.graphs:
            if len(self.graphs) >= MOST:
                return call(*args, **kwargs)
            self.graphs[key] = Graphed(_of_tensors(call, values, list(kwargs), autocast), tensors[0].device)
        return self.graphs[key](*tensors).clone()

    def _goes(self, tensors: Sequence[Tensor], rest: Sequence[Any]) -> bool:
        """Whether a graph does the same: of tensors on the GPU, and of numbers and None alone, as masks and
        label drops, which are asked for by True, are drawn on the host."""
        if torch.is_grad_enabled() or self.model.training or torch.compiler.is_compiling():
            return False
        plain = all(value is None or (isinstance(value, int | float) and value is not True) for value in rest)
        return plain and bool(tensors) and all(on_a_gpu(each) and each.ndim for each in tensors)

    def _follow(self) -> None:
        """None of the graphs that read weights where they are no more."""
        before, self.addresses = self.addresses, [weight.data_ptr() for weight in self.model.parameters()]
        if self.addresses != before:
            self.graphs.clear()


def on_a_gpu(tensor: Tensor) -> bool:
    return tensor.is_cuda


def _written(value: Any) -> tuple[type, Any]:
    """``value`` as a part of a key, where 1, 1.0 and True are not the same."""
    return type(value), value


def _of_tensors(
    call: Callable[..., Tensor],
    values: Sequence[Any],
    names: Sequence[str],
    autocast: tuple[bool, torch.dtype],
) -> Callable[..., Tensor]:
    """``call`` as a function of the tensors among ``values``, the last of which have ``names``."""
    places = [i for i, value in enumerate(values) if isinstance(value, Tensor)]
    rest = [None if isinstance(value, Tensor) else value for value in values]

    def function(*tensors: Tensor) -> Tensor:
        given = [*rest]
        for place, tensor in zip(places, tensors, strict=True):
            given[place] = tensor
        number = len(given) - len(names)
        # Casts that autocast keeps would be gone when the graph is replayed.
        with torch.autocast("cuda", enabled=autocast[0], dtype=autocast[1], cache_enabled=False):
            return call(*given[:number], **dict(zip(names, given[number:], strict=True)))

    return function
