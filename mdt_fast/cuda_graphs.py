"""CUDA graphs: one launch for all the kernels of a step."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

WARM_UP = 3  # calls before the capture: libraries choose algorithms and take their workspaces in them


class Graphed:
    """A function of tensors (or None) that is captured at its first call with arguments of these shapes.

    It must not read values on the host. What a call returns is written over by the next one. ``warmed_up``
    is called before each capture: the function was called a few times more than was asked for.
    """

    def __init__(
        self,
        function: Callable[..., Tensor],
        device: torch.device,
        warmed_up: Callable[[], None] = lambda: None,
    ):
        self.function, self.device, self.warmed_up = function, device, warmed_up
        self.captured: dict[Any, tuple[torch.cuda.CUDAGraph, list[Tensor | None], Tensor]] = {}
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, *args: Tensor | None) -> Tensor:
        key = tuple(None if arg is None else (arg.shape, arg.dtype) for arg in args)
        with torch.cuda.device(self.device):
            if key not in self.captured:
                self.captured[key] = self._capture(args)
            graph, inputs, output = self.captured[key]
            for own, given in zip(inputs, args, strict=True):
                if own is not None and given is not None:
                    own.copy_(given)
            graph.replay()
        return output

    def _capture(
        self, args: tuple[Tensor | None, ...]
    ) -> tuple[torch.cuda.CUDAGraph, list[Tensor | None], Tensor]:
        inputs = [None if arg is None else arg.clone(memory_format=torch.contiguous_format) for arg in args]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                self.function(*inputs)
        torch.cuda.current_stream().wait_stream(stream)
        self.warmed_up()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            output = self.function(*inputs)
        return graph, inputs, output
