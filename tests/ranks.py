"""Several processes in one test, connected by gloo."""

import inspect
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from forked import CONTEXT
from mdt_fast.training.distributed import let_go


def run_ranks(tmp_path: Path, job: Callable[..., None], *args: Any, world: int = 2) -> None:
    """Run ``job(rank, *args)`` in each of ``world`` processes; raises what any of them raises."""
    where = inspect.getfile(job), job.__name__  # by file: other projects install packages named `tests`, too
    given = world, str(tmp_path / "rendezvous"), where, args
    mp.start_processes(on_rank, given, nprocs=world, start_method=CONTEXT.get_start_method())


def on_rank(rank: int, world: int, rendezvous: str, where: tuple[str, str], args: tuple[Any, ...]) -> None:
    file, name = where
    job = runpy.run_path(file)[name]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world)
    job(rank, *args)
    dist.barrier()
    let_go()
    dist.destroy_process_group()
