"""The processes of a run: one, or those that torchrun (or Slurm) started, told by RANK and WORLD_SIZE.

Two process groups: the default one moves parameters and gradients (NCCL on CUDA, gloo on a CPU), the
``control`` one, always gloo, what the host has to know: a signal, a bad image, losses to be logged. Neither a
device nor another process is waited for in a step but for the control message of the step before.
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

STORE_TIMEOUT, REPORT_TIMEOUT = timedelta(minutes=5), timedelta(seconds=5)


@dataclass
class World:
    """``rank`` of ``size`` processes, ``local_size`` of them on this machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    control: Any = None
    checkpoints: Any = None  # a group of its own: a checkpoint is written beside the training
    _pending: tuple[Tensor, Any] | None = field(default=None, repr=False)

    @property
    def main(self) -> bool:
        """Whether this process prints and writes what there is one of."""
        return self.rank == 0

    def agree(self, flag: int) -> int:
        """The largest ``flag`` of all processes in the call before this one (0 in the first), alike on all.

        It costs no waiting, as the answer had a whole step to come. Alone: ``flag`` itself.
        """
        if self.size == 1:
            return flag
        agreed = self.settle()
        message = torch.tensor(flag)
        self._pending = message, dist.all_reduce(message, dist.ReduceOp.MAX, self.control, async_op=True)
        return agreed

    def settle(self) -> int:
        """The answer to the last :meth:`agree`, waited for."""
        if self._pending is None:
            return 0
        message, work = self._pending
        self._pending = None
        work.wait()
        return int(message)

    def together(self, tensor: Tensor) -> list[Tensor]:
        """``tensor`` (on the CPU, of one shape everywhere) of every process, by rank."""
        if self.size == 1:
            return [tensor]
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(parts, tensor.contiguous(), group=self.control)
        return parts

    def from_main(self, value: Any) -> Any:
        """What process 0 passes, on all."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]

    def everyones(self, value: Any, group: Any = None) -> list[Any]:
        """What every process passes, by rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=group or self.control)
        return values

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier(group=self.control)


def launched() -> tuple[int, int]:
    """(rank, number of processes) by the environment; (0, 1) where nothing launched several."""
    try:
        rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    except ValueError:
        raise UserError(
            f"RANK and WORLD_SIZE: {os.environ.get('RANK')!r} and {os.environ.get('WORLD_SIZE')!r} are no "
            "whole numbers; start the run with torchrun"
        ) from None
    return rank, size


@contextmanager
def joined(device: torch.device) -> Iterator[World]:
    """This process's place among those of the run, connected to the others until the block is left.

    ``UserError`` if they cannot be connected.
    """
    rank, size = launched()
    if size == 1:
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            yield World()
        return
    local_rank = int(os.environ.get("LOCAL_RANK", rank))
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", size))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    try:
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            # torchrun keeps its store when it starts lost processes again; their old addresses stay in it.
            store = dist.PrefixStore(f"mdt_fast/attempt_{_attempt()}", _torchruns_store(STORE_TIMEOUT))
            dist.init_process_group(backend, store=store, rank=rank, world_size=size)
        else:
            dist.init_process_group(backend)
        control, checkpoints = dist.new_group(backend="gloo"), dist.new_group(backend="gloo")
    except (RuntimeError, ValueError) as error:
        raise UserError(f"process {rank} of {size} cannot join the others: {_first_line(error)}") from None
    world = World(rank, size, local_rank, local_size, control, checkpoints)
    yield world
    world.settle()
    world.barrier()
    let_go()
    dist.destroy_process_group()


def let_go(patience: float = 10.0) -> None:
    """Waits, ``patience`` seconds at most, until gloo's threads hold no tensors of finished collectives.

    A collective is over for its caller before the thread that ran it drops its tensors, which takes the
    interpreter's lock; asking for it while the interpreter shuts down ends in an abort, and with the process
    group such a thread outlives :func:`torch.distributed.destroy_process_group`. Linux tells who is at work.
    """
    until, idle = time.monotonic() + patience, 0
    while idle < 2 and time.monotonic() < until:
        time.sleep(0.001)  # one that waited for the lock as it was looked at, has it at the second look
        idle = 0 if any(_runs(task) for task in Path("/proc/self/task").glob("*")) else idle + 1


def _runs(task: Path) -> bool:
    """Whether it is one of gloo's threads and runs, or would if it had a processor."""
    with suppress(OSError):  # it ended meanwhile
        name, _, state = task.joinpath("stat").read_text().partition("(")[2].rpartition(") ")
        return "gloo" in name and state.startswith(("R", "D"))
    return False


@contextmanager
def losses_named(world: World) -> Iterator[None]:
    """What another process's end raises here, when it is next waited for, becomes a ``UserError``."""
    try:
        yield
    except RuntimeError as error:
        if not is_loss(error, world):
            raise
        raise UserError(f"another process of the run was lost ({_first_line(error)})") from error


def is_loss(error: BaseException, world: World) -> bool:
    """Whether ``error`` comes from another process's end."""
    words = ("gloo", "NCCL", "onnection", "Broken pipe", "ocket", "peer")
    told = isinstance(error, dist.DistError) or any(word in str(error) for word in words)
    return world.size > 1 and isinstance(error, RuntimeError) and told


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:160] if lines else type(error).__name__


def first_to_report() -> bool:
    """Whether no other process of the run has said why it ends: the first one's reason is the reason."""
    if launched()[1] == 1:
        return True
    with suppress(Exception):  # a store that is gone as well: better twice than not at all
        return _torchruns_store(REPORT_TIMEOUT).add(f"mdt_fast/reported_{_attempt()}", 1) == 1
    return True


def warnings_of_launch() -> list[str]:
    """What is wrong with how several machines' processes were started, as far as it shows."""
    several = int(os.environ.get("GROUP_WORLD_SIZE", "1")) > 1
    if not several or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return []
    return [
        "warning: TORCH_DISABLE_SHARE_RDZV_TCP_STORE is not 1: after a restart that not all machines have "
        "counted, their processes will not find each other; export it on all of them"
    ]


def _attempt() -> str:
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")


def _torchruns_store(timeout: timedelta) -> dist.Store:
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return dist.TCPStore(host, port, is_master=False, timeout=timeout, wait_for_workers=False)


def leave(code: int) -> int:
    """``code``, to exit with. One process of several ends at once: its threads may wait for others that are
    gone."""
    if launched()[1] > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code
