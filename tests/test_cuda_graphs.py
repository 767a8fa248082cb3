"""When captures are warmed up, how often, and in whose memory: with a stand-in for the device."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from mdt_fast.cuda_graphs import WARM_UP, Graphed

POOL = (0, 7)


class Stand:
    """A stream, or a graph whose replay does nothing."""

    def __init__(self, *_: Any):
        pass

    def wait_stream(self, other: Any) -> None:
        pass

    def replay(self) -> None:
        pass


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is done with the allocator, as it is done."""
    done: list[str] = []

    def noted(name: str) -> Callable[[int, tuple[int, int]], None]:
        def call(device: int, pool: tuple[int, int]) -> None:
            assert (device, pool) == (0, POOL)
            done.append(name)

        return call

    for name, stand in (
        ("graph_pool_handle", lambda: POOL), ("Stream", Stand), ("current_stream", Stand),
        ("stream", nullcontext), ("device", nullcontext), ("CUDAGraph", Stand), ("current_device", lambda: 0),
        ("graph", lambda graph, pool, stream, capture_error_mode: nullcontext()),
        ("empty_cache", lambda: done.append("empty")),
    ):  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, stand)
    for name in ("beginAllocateCurrentThreadToPool", "endAllocateToPool", "releasePool"):
        monkeypatch.setattr(torch._C, f"_cuda_{name}", noted(name.partition("Allocate")[0]), raising=False)
    return done


def test_a_capture_in_inference_mode_serves_outside_of_it(calls: list[str]) -> None:
    graphed, x = Graphed(lambda x: x, torch.device("cpu")), torch.ones(2, requires_grad=True)
    with torch.inference_mode():
        graphed(torch.zeros(2))
    with torch.no_grad():
        assert graphed(x).tolist() == [1, 1]
    assert len(graphed.captured) == 1


def test_later_captures_borrow_the_graphs_memory(calls: list[str]) -> None:
    threads: list[bool] = []

    def function(x: Tensor) -> Tensor:
        calls.append("call")
        threads.append(torch.autograd.is_multithreading_enabled())
        if len(x) == 3 and threads[-1] is False:
            raise RuntimeError("out of memory")
        return x

    graphed = Graphed(function, torch.device("cpu"))
    graphed(torch.zeros(1))
    assert calls == ["call"] * (WARM_UP + 1)
    assert all(threads)
    calls.clear()
    graphed(torch.zeros(2))
    assert calls == ["empty", "begin", "call", "end", "releasePool", "call"]
    assert threads[-2:] == [False, True]
    calls.clear()
    with pytest.raises(RuntimeError, match="out of memory"):
        graphed(torch.zeros(3))
    assert calls == ["empty", "begin", "call", "end", "releasePool"]
    assert torch.autograd.is_multithreading_enabled()
    assert len(graphed.captured) == 2
