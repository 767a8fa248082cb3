"""When captures are warmed up, how often, and in whose memory; a stand-in replaces the device."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from mdt_fast import cuda_graphs
from mdt_fast.cuda_graphs import WARM_UP, Graphed
from mdt_fast.errors import UserError

POOL = (0, 7)


class Stand:
    """A stream, or a graph whose replay does nothing."""

    def __init__(self, *_: Any):
        pass

    def wait_stream(self, other: Any) -> None:
        pass

    def replay(self) -> None:
        pass

    def reset(self) -> None:
        pass


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The calls to the allocator, in order."""
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
        ("empty_cache", lambda: done.append("empty")), ("set_stream", lambda stream: done.append("stream")),
    ):  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, stand)
    monkeypatch.setattr(cuda_graphs, "_streams", cuda_graphs._Streams())
    monkeypatch.setattr(cuda_graphs, "_failed", [])
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


@pytest.mark.parametrize("ended", [False, True])
@pytest.mark.parametrize("error", ["operation not permitted when stream is capturing", "out of memory"])
def test_a_capture_that_fails_leaves_nothing_half_begun(
    error: str, ended: bool, calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In torch 2.11 a failed capture leaves its pool and generator in capture mode, and its stream current;
    later versions end the capture. Where it has ended, its memory is given back."""

    class Capture:
        def __init__(self, graph: Any, stream: Any, capture_error_mode: str, pool: Any = None):
            self.own = pool is None

        def __enter__(self) -> None:
            calls.append("spare" if self.own else "capture")

        def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
            calls.append("good" if error is None else "bad")

    def end(device: int, pool: tuple[int, int]) -> None:
        if ended:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        calls.append("end")

    def function(x: Tensor) -> Tensor:
        if calls[-1:] == ["capture"]:
            raise RuntimeError(error)
        return x

    monkeypatch.setattr(torch.cuda, "graph", Capture)
    monkeypatch.setattr(Stand, "reset", lambda self: calls.append("reset"))
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", end, raising=False)
    graphed = Graphed(function, torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 8))
    said = f"reads values on the host.*{error}" if "captur" in error else f"^{error}$"
    with pytest.raises(UserError if "captur" in error else RuntimeError, match=said):
        graphed(torch.zeros(1))
    released = ["reset"] if ended else ["end", "releasePool"]
    assert calls == ["capture", "bad", "stream", *released, "spare", "good"]
    assert len(cuda_graphs._failed) == (not ended)
    assert graphed.pool == (POOL if ended else (0, 8))
    assert not graphed.captured


def test_one_stream_to_capture_on(calls: list[str]) -> None:
    first, second = (Graphed(lambda x: x, torch.device("cpu")) for _ in range(2))
    assert first.stream is second.stream
    assert Graphed(lambda x: x, torch.device("cpu"), beside=first).stream is first.stream
