"""A call captured as one CUDA graph: its replays are timed without Python between the kernels."""

from collections.abc import Callable
from typing import Any

from formats import one_line

Replay = Callable[[], object]


def captured(call: Replay, capture: Callable[[Any], Replay] | None, notes: list[str]) -> Replay:
    """What is timed: a replay of ``call``, or itself where it cannot be captured, with a note."""
    if capture is None:
        return call
    try:
        replay = capture(call)
        replay()  # captures
    except Exception as error:  # whatever a library does that a graph cannot hold
        notes.append(f"launched kernel by kernel, not replayed from a graph: {one_line(error)}")
        return call
    return replay
