"""A stand-in for CUDA graphs on a CPU."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from mdt_fast.cuda_graphs import Key, key_of
from mdt_fast.models import graphed

WARM_UP = 3


class Replayed:
    """Does on a CPU what ``Graphed`` does: a replay calls with the inputs and outputs of the first call."""

    made: ClassVar[list["Replayed"]] = []

    def __init__(
        self,
        function: Callable[..., Tensor],
        device: torch.device,
        warmed_up: Callable[[], None],
        done: Callable[[Key], None],
    ):
        self.function, self.warmed_up, self.done = function, warmed_up, done
        self.captured: dict[Key, tuple[list[Tensor | None], Tensor, list[Tensor | None]]] = {}
        self.made.append(self)

    def __call__(self, *args: Tensor | None) -> Tensor:
        key, new = key_of(args), False
        if key not in self.captured:
            with torch.inference_mode(False):
                inputs = [None if arg is None else arg.detach().clone() for arg in args]
            for _ in range(WARM_UP):
                self.function(*inputs)
            self.warmed_up()
            before = self.gradients()
            output = self.function(*inputs)
            self.captured[key], new = (inputs, output, self.gradients()), True
            for was, gradient in zip(before, self.gradients(), strict=True):
                assert was is None or was is gradient  # accumulated into, where there was one
            self.done(key)
        inputs, output, gradients = self.captured[key]
        for own, given in zip(inputs, args, strict=True):
            if own is not None:
                own.copy_(given.detach())
        if all(gradient is None for gradient in self.gradients()):
            output.copy_(self.function(*inputs))
            for own, gradient in zip(gradients, self.gradients(), strict=True):
                if own is not None:  # a graph writes to the addresses of its capture
                    own.copy_(gradient)
        else:
            addresses = [None if gradient is None else gradient.data_ptr() for gradient in self.gradients()]
            if new:  # drop what the capture added: on a GPU it only records
                self.warmed_up()
            output.copy_(self.function(*inputs))
            assert addresses == [None if g is None else g.data_ptr() for g in gradients]
        return output

    def gradients(self) -> list[Tensor | None]:
        parameters = self.warmed_up.__self__.parameters
        return [parameter.grad for parameter in parameters]


class Captured:
    """The same for a function without gradients; ``captures`` lists the keys in the order first seen."""

    captures: ClassVar[list[Any]] = []

    def __init__(self, function: Any, device: torch.device, beside: Any = None, warm_up: int = WARM_UP):
        self.function, self.captured = function, {}

    def __call__(self, *args: Tensor) -> Tensor:
        key = key_of(args)
        if key not in self.captured:
            with torch.inference_mode(False):
                inputs = [arg.detach().clone() for arg in args]
            self.captured[key] = inputs, self.function(*inputs)
            self.captures.append(key)
        inputs, output = self.captured[key]
        for own, given in zip(inputs, args, strict=True):
            own.copy_(given.detach())
        return output.copy_(self.function(*inputs))


def graphs_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Passes of models are ``Captured``, as if on a GPU that waits for launches."""
    monkeypatch.setattr(graphed, "Graphed", Captured)
    monkeypatch.setattr(graphed, "on_a_gpu", lambda tensor: True)
    monkeypatch.setattr(graphed, "mark", lambda output: SimpleNamespace(query=lambda: True))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(Captured, "captures", [])
