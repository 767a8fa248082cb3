"""CUDA graphs: one launch for all kernels of a step."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from .errors import UserError

WARM_UP = 3
"""Warm-up calls before the first capture, in which libraries choose algorithms and allocate workspaces. Later
captures take one such call, which compiles the kernels for the new shapes."""

Key = tuple[Any, ...]
"""Identifies what a graph was captured for."""


class _Streams(threading.local):
    """The stream on which each thread captures, per GPU: libraries keep a workspace for every stream."""

    def __init__(self) -> None:
        self.of: dict[int, torch.cuda.Stream] = {}


_streams = _Streams()
_failed: list[torch.cuda.CUDAGraph] = []
"""Graphs whose capture did not finish: torch 2.11 keeps pointing at them."""


def key_of(args: Sequence[Tensor | None]) -> Key:
    """The shapes and dtypes of the arguments."""
    return tuple(None if arg is None else (arg.shape, arg.dtype) for arg in args)


class Graphed:
    """A function of tensors (or None), captured at its first call with arguments of given shapes and dtypes.

    The function must not read values on the host. Memory that it keeps between calls must exist after the
    first call: later captures may overwrite anything else that it allocates. The next call overwrites the
    returned tensor. ``warmed_up`` is called before each capture, as the function has by then run more often
    than requested; ``done`` is called after it, with the arguments' key. ``beside``: another ``Graphed``
    whose memory pool and stream this one's graphs share, as they run one after the other and nobody keeps
    their results. ``warm_up``: calls before the first capture.
    """

    def __init__(
        self,
        function: Callable[..., Tensor],
        device: torch.device,
        warmed_up: Callable[[], None] = lambda: None,
        done: Callable[[Key], None] = lambda key: None,
        beside: "Graphed | None" = None,
        warm_up: int = WARM_UP,
    ):
        self.function, self.device, self.warmed_up, self.done = function, device, warmed_up, done
        self.warm_up = warm_up
        self.captured: dict[Key, tuple[torch.cuda.CUDAGraph, list[Tensor | None], Tensor]] = {}
        self.pool: Any = torch.cuda.graph_pool_handle() if beside is None else beside.pool
        # Memory is taken again only on the stream that it was taken on.
        self.stream: torch.cuda.Stream = _stream(device) if beside is None else beside.stream

    def __call__(self, *args: Tensor | None) -> Tensor:
        key = key_of(args)
        with torch.cuda.device(self.device):
            if key not in self.captured:
                self.captured[key] = self._capture(args)
                self.done(key)
            graph, inputs, output = self.captured[key]
            for own, given in zip(inputs, args, strict=True):
                if own is not None and given is not None:
                    own.copy_(given.detach())
            graph.replay()
        return output

    def _capture(
        self, args: tuple[Tensor | None, ...]
    ) -> tuple[torch.cuda.CUDAGraph, list[Tensor | None], Tensor]:
        with torch.inference_mode(False):  # they outlive an inference mode that may be active here
            inputs = [None if arg is None else _copy(arg) for arg in args]
        self.stream.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(self.stream), self._lending():
                for _ in range(1 if self.captured else self.warm_up):
                    self.function(*inputs)
        finally:
            torch.cuda.current_stream().wait_stream(self.stream)
        self.warmed_up()
        graph, before = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        # Meanwhile other threads load images, write checkpoints and watch NCCL; that must not be an error.
        try:
            with torch.cuda.graph(
                graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"
            ):
                output = self.function(*inputs)
        except BaseException as error:
            self._end(graph, before)
            if not isinstance(error, RuntimeError) or "captur" not in str(error):
                raise
            raise UserError(
                "CUDA graphs: something here reads values on the host or allocates memory, which a graph "
                f"cannot do; cuda_graphs=False may work ({str(error).splitlines()[0]})"
            ) from error
        return graph, inputs, output

    def _end(self, graph: torch.cuda.CUDAGraph, before: torch.cuda.Stream) -> None:
        """Clean up after a failed capture. torch 2.11 leaves it half open: its stream is still current, its
        pool takes all allocations, and the default generator still draws for graphs only."""
        torch.cuda.set_stream(before)
        here, half_open = (torch.cuda.current_device(), self.pool), False
        with suppress(RuntimeError):  # raised if the capture has ended, as it does in most cases
            torch._C._cuda_endAllocateToPool(*here)
            torch._C._cuda_releasePool(*here)
            half_open = True
        if half_open:
            _failed.append(graph)
            if not self.captured:  # the pool is gone; its handle must not come back
                self.pool = torch.cuda.graph_pool_handle()
        else:
            with suppress(RuntimeError):
                graph.reset()  # which gives its memory back
        with suppress(RuntimeError):  # a capture that succeeds gives the generator back
            with torch.cuda.graph(
                torch.cuda.CUDAGraph(), stream=self.stream, capture_error_mode="thread_local"
            ):
                torch.zeros(1, device=self.device)
            return
        torch.cuda.set_stream(before)

    @contextmanager
    def _lending(self) -> Iterator[None]:
        """From the second capture on, allocate here from the graphs' memory, as no graph runs now: otherwise
        a step would be in memory twice."""
        if not self.captured:
            yield
            return
        torch.cuda.empty_cache()  # as a capture does: memory cached elsewhere is out of reach from here on
        here = torch.cuda.current_device(), self.pool
        torch._C._cuda_beginAllocateCurrentThreadToPool(*here)
        try:
            with torch.autograd.set_multithreading_enabled(False):  # run backward passes in this thread too
                yield
        finally:
            torch._C._cuda_endAllocateToPool(*here)
            torch._C._cuda_releasePool(*here)


def _stream(device: torch.device) -> torch.cuda.Stream:
    index = torch.cuda.current_device() if device.index is None else device.index
    if index not in _streams.of:
        _streams.of[index] = torch.cuda.Stream(device)
    return _streams.of[index]


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().clone(memory_format=torch.contiguous_format)


def lent(tensor: Tensor, graph: torch.cuda.CUDAGraph) -> Tensor:
    """On a GPU, a tensor in the same memory, which keeps ``graph`` and so the memory alive. Once ``tensor``
    is gone, graphs captured later may write to it. Elsewhere, ``tensor`` itself."""
    if tensor.device.type != "cuda" or not tensor.numel():
        return tensor
    span = 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    memory = _Memory(tensor.data_ptr(), span * tensor.element_size(), graph)
    values = torch.as_tensor(memory, device=tensor.device).view(tensor.dtype)
    return values.as_strided(tensor.shape, tensor.stride())


class _Memory:
    """Memory that belongs to ``owner``, in the form in which array libraries exchange it."""

    def __init__(self, address: int, size: int, owner: object):
        self.owner = owner
        self.__cuda_array_interface__ = {
            "data": (address, False), "shape": (size,), "strides": None, "typestr": "|u1", "version": 3,
        }  # fmt: skip


class Numbers:
    """A model's parameters and buffers, which graphs read in place. Its modules are those at construction."""

    def __init__(self, model: nn.Module):
        self.held = [each for m in model.modules() for each in (m._parameters, m._buffers) if each]
        self.before: list[tuple[Tensor, int, bool]] = []

    def moved(self) -> bool:
        """Whether any were replaced, moved in memory, frozen or unfrozen since the last call."""
        now = [
            (x, x.data_ptr(), x.requires_grad) for each in self.held for x in each.values() if x is not None
        ]
        before, self.before = self.before, now
        return len(now) != len(before) or any(
            a[0] is not b[0] or a[1:] != b[1:] for a, b in zip(now, before, strict=True)
        )
