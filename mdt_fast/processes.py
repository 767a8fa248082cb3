"""This process: its rank among those that a launcher started, its device, and the signals sent to it."""

import os
import signal
import threading
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch

from .errors import UserError


@dataclass(frozen=True)
class Ranks:
    """This process's ``rank`` among ``world`` processes, ``local_rank`` of ``local_world`` on this node.

    ``local_rank`` is None if the launcher did not set it.
    """

    rank: int = 0
    world: int = 1
    local_rank: int | None = None
    local_world: int = 1

    @classmethod
    def from_environment(cls) -> "Ranks":
        """As a launcher such as torchrun sets them in the environment; rank 0 of 1 without one. ``UserError``
        if they make no sense."""
        rank, world = _number("RANK", 0), _number("WORLD_SIZE", 1)
        if rank >= world:
            raise UserError(f"RANK: got {rank}, expected a number below WORLD_SIZE={world}")
        local_rank = _number("LOCAL_RANK", 0) if "LOCAL_RANK" in os.environ else None
        return cls(rank, world, local_rank, _number("LOCAL_WORLD_SIZE", world))


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.isdecimal():
        raise UserError(f"{name}: got {text!r}, expected a number in this environment variable")
    return int(text)


def resolve_device(name: str) -> torch.device:
    """``auto`` (CUDA if available), or a torch device name. With several processes on a node, each takes the
    GPU of its local rank. ``UserError`` if there is no such device."""
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
    except (RuntimeError, TypeError):
        raise UserError(f"device: got {name!r}, expected auto, cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"device: got {name!r}, expected auto, cpu, cuda or cuda:N")
    if device.type == "cuda":
        ranks, devices = Ranks.from_environment(), torch.cuda.device_count()
        several = ranks.world > 1
        if several and ranks.local_rank is None and devices > 1:
            raise UserError(
                "LOCAL_RANK: not set, so processes cannot be assigned to GPUs; start the run with torchrun"
            )
        index = (ranks.local_rank or 0) if several else device.index or 0
        if index >= devices:
            asked = f"local rank {index} needs its own GPU" if several else f"got {name!r}"
            raise UserError(f"device: {asked}, but this machine has {devices} CUDA devices")
        device = torch.device("cuda", index)
    return device


class Interrupts:
    """Within ``with``, the first SIGINT, SIGTERM, SIGUSR1 or SIGHUP is only recorded in ``caught``.

    After that, SIGINT and SIGTERM act as usual, except with several processes: there the scheduler and
    torchrun both send the same signal. Ignored signals (SIGHUP under nohup) stay ignored.
    """

    NUMBERS = tuple(
        getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP") if hasattr(signal, name)
    )

    def __init__(self) -> None:
        self.caught: int | None = None
        self._several = Ranks.from_environment().world > 1
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Interrupts":
        if threading.current_thread() is threading.main_thread():  # Python allows handlers only there
            self._before = {
                number: signal.signal(number, self._note)
                for number in self.NUMBERS
                if signal.getsignal(number) != signal.SIG_IGN
            }
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.caught = self.caught or number
        if self._several:
            return
        for usual in (signal.SIGINT, signal.SIGTERM):  # not SIGHUP: a closing terminal sends several
            if usual in self._before:
                signal.signal(usual, self._before[usual])
