"""Several processes in one test, connected by gloo."""

import inspect
import multiprocessing
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from mdt_fast.training.distributed import let_go

PRELOADED = ["pytest", "torch._dynamo", "torch.distributed.fsdp", "mdt_fast.training", "mdt_fast.models"]
"""What such a process needs sooner or later: imported once, by the server that forks them."""


def spawn(tmp_path: Path, job: Callable[..., None], *args: Any, world: int = 2) -> None:
    """Run ``job(rank, *args)`` in each of ``world`` processes; raises what any of them raises."""
    where = inspect.getfile(job), job.__name__  # by file: other projects install packages named `tests`, too
    multiprocessing.set_forkserver_preload(PRELOADED)
    rendezvous = str(tmp_path / "rendezvous")
    mp.start_processes(on_rank, (world, rendezvous, where, args), nprocs=world, start_method="forkserver")


def on_rank(rank: int, world: int, rendezvous: str, where: tuple[str, str], args: tuple[Any, ...]) -> None:
    file, name = where
    job = runpy.run_path(file)[name]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world)
    job(rank, *args)
    dist.barrier()
    let_go()
    dist.destroy_process_group()
