"""A call captured as one CUDA graph: its replays are timed without Python between the kernels."""

from collections.abc import Callable

import torch
from torch import Tensor

from formats import one_line

Call = Callable[[], list[Tensor]]
Replay = Callable[[], object]
WARM_UP = 3


def captured(call: Call, capture: Callable[[Call], Replay] | None, notes: list[str]) -> Replay:
    """What is timed: a replay of ``call``, or itself where it cannot be captured, with a note."""
    if capture is None:
        return call
    try:
        return capture(call)
    except Exception as error:
        notes.append(f"launched kernel by kernel, not replayed from a graph: {one_line(error)}")
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return call


def graph_of(call: Call) -> Replay:
    """A replay of ``call``, captured as one CUDA graph on the current device."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()

    def replay() -> list[Tensor]:
        graph.replay()
        return results

    return replay
