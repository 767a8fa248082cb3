"""The processes of a run: one, or those started by torchrun (or Slurm), read from RANK and WORLD_SIZE.

The default process group moves parameters and gradients (NCCL on CUDA, gloo on a CPU). The ``control`` group,
always gloo, carries what the host must know: signals, bad images, losses to log. Within a step the host waits
neither for a device nor for another process, except for the control message of the previous step.
"""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import UserError
from ..processes import Ranks

STORE_TIMEOUT, REPORT_TIMEOUT = timedelta(minutes=5), timedelta(seconds=5)
_join = 0
"""How many times this process has joined the others. All count alike if all begin the same runs."""


@dataclass
class World:
    """This process: ``rank`` of ``size`` processes, ``local_size`` of them on this node."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    control: Any = None
    checkpoints: Any = None  # a separate group, because checkpoints are written during training
    _pending: tuple[Tensor, Any] | None = field(default=None, repr=False)

    @property
    def main(self) -> bool:
        """Whether this process is rank 0, which prints and writes shared files."""
        return self.rank == 0

    def agree(self, flag: int) -> int:
        """The largest ``flag`` of all processes in the previous call (0 in the first); the same on all ranks.

        This hardly waits, as the answer had a whole step to arrive. With one process: ``flag`` itself.
        """
        if self.size == 1:
            return flag
        agreed = self.settle()
        message = torch.tensor(flag)
        self._pending = message, dist.all_reduce(message, dist.ReduceOp.MAX, self.control, async_op=True)
        return agreed

    def settle(self) -> int:
        """Wait for the answer to the last :meth:`agree` and return it."""
        if self._pending is None:
            return 0
        message, work = self._pending
        self._pending = None
        work.wait()
        return int(message)

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        """All-gather ``tensor`` (on the CPU, same shape on every rank); returns one tensor per rank."""
        if self.size == 1:
            return [tensor]
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(parts, tensor.contiguous(), group=self.control)
        return parts

    def from_main(self, value: Any) -> Any:
        """Broadcast rank 0's ``value`` to all ranks."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]

    def all_gather_object(self, value: Any, group: Any = None) -> list[Any]:
        """All-gather ``value``; returns one value per rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=group or self.control)
        return values

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier(group=self.control)


@contextmanager
def joined(device: torch.device) -> Iterator[World]:
    """Join the run's process group for the duration of the block; yields this process's :class:`World`.

    ``UserError`` if the processes cannot connect.
    """
    global _join
    _join += 1
    ranks = Ranks.from_environment()
    if ranks.world == 1:
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            yield World()
        return
    rank, size = ranks.rank, ranks.world
    local_rank = rank if ranks.local_rank is None else ranks.local_rank
    if device.type == "cuda":
        torch.cuda.set_device(device)
    try:
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            # torchrun keeps its store when it restarts processes, and when these join again, with their old
            # addresses still in it.
            store = dist.PrefixStore(f"mdt_fast/attempt_{_attempt()}", _torchruns_store(STORE_TIMEOUT))
            dist.init_process_group(backend, store=store, rank=rank, world_size=size)
        else:
            dist.init_process_group(backend)
        control, checkpoints = dist.new_group(backend="gloo"), dist.new_group(backend="gloo")
    except (RuntimeError, ValueError) as error:
        raise UserError(f"process {rank} of {size} cannot join the others: {_first_line(error)}") from None
    world = World(rank, size, local_rank, ranks.local_world, control, checkpoints)
    yield world
    world.settle()
    world.barrier()
    let_go()
    dist.destroy_process_group()


def let_go(patience: float = 10.0) -> None:
    """Wait, ``patience`` seconds at most, until gloo's threads hold no tensors of finished collectives.

    A collective returns to its caller before the thread that ran it drops its tensors, which takes the GIL.
    Taking the GIL while the interpreter shuts down aborts the process, and such a thread can outlive
    :func:`torch.distributed.destroy_process_group`. Linux reports which threads are running.
    """
    until, idle = time.monotonic() + patience, 0
    while idle < 2 and time.monotonic() < until:
        time.sleep(0.001)  # a thread that was waiting for the GIL at the first look has it at the second
        idle = 0 if any(_runs(task) for task in Path("/proc/self/task").glob("*")) else idle + 1


def _runs(task: Path) -> bool:
    """Whether ``task`` is one of gloo's threads and is running or runnable."""
    with suppress(OSError):  # it has ended meanwhile
        name, _, state = task.joinpath("stat").read_text().partition("(")[2].rpartition(") ")
        return "gloo" in name and state.startswith(("R", "D"))
    return False


@contextmanager
def lost_processes_named(world: World) -> Iterator[None]:
    """Turn the error that a lost process causes here, when next waited for, into a ``UserError``."""
    try:
        yield
    except RuntimeError as error:
        if not is_lost_process(error, world):
            raise
        raise UserError(f"another process of the run was lost ({_first_line(error)})") from error


def is_lost_process(error: BaseException, world: World) -> bool:
    """Whether ``error`` was caused by the loss of another process."""
    words = ("gloo", "NCCL", "onnection", "Broken pipe", "ocket", "peer")
    told = isinstance(error, dist.DistError) or any(word in str(error) for word in words)
    return world.size > 1 and isinstance(error, RuntimeError) and told


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:160] if lines else type(error).__name__


def first_to_report() -> bool:
    """Whether this is the first process of the run to report an error; only the first one prints."""
    if not _several():
        return True
    with suppress(Exception):  # if the store is gone too, better to report twice than not at all
        return _torchruns_store(REPORT_TIMEOUT).add(f"mdt_fast/reported_{_attempt()}", 1) == 1
    return True


def warnings_of_launch() -> list[str]:
    """Warnings about how a multi-node run was launched, as far as this can be detected."""
    several = int(os.environ.get("GROUP_WORLD_SIZE", "1")) > 1
    if not several or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return []
    return [
        "warning: TORCH_DISABLE_SHARE_RDZV_TCP_STORE is not 1: after a restart that not all nodes have "
        "counted, their processes will not find each other; export it as 1 on all nodes"
    ]


def _attempt() -> str:
    return f"{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}_{_join}"


def _torchruns_store(timeout: timedelta) -> dist.Store:
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return dist.TCPStore(host, port, is_master=False, timeout=timeout, wait_for_workers=False)


def leave(code: int) -> int:
    """Return ``code`` to exit with. With several processes, exit at once instead, because threads may be
    waiting for lost processes."""
    if _several():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _several() -> bool:
    """Whether this is one of several processes. Not if the environment makes no sense, which is then the
    error to report."""
    with suppress(UserError):
        return Ranks.from_environment().world > 1
    return False
