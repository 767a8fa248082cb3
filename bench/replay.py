"""Capture a call as one CUDA graph, so that its replays are timed without Python between the kernels."""

from collections.abc import Callable
from typing import Any

from formats import one_line

Replay = Callable[[], object]


def captured(call: Replay, capture: Callable[[Any], Replay] | None, notes: list[str]) -> Replay:
    """A replay of ``call`` to be timed. If it cannot be captured, ``call`` itself, with a note added."""
    if capture is None:
        return call
    try:
        replay = capture(call)
        replay()  # captures
    except Exception as error:  # libraries may do anything that a graph cannot hold
        notes.append(f"launched kernel by kernel, not replayed from a graph: {one_line(error)}")
        return call
    return replay
