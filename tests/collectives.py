"""Counts what the processes of a training step hand to their collectives."""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.utils._python_dispatch import TorchDispatchMode

from mdt_fast.config import RunConfig, Switches
from mdt_fast.diffusion import create_diffusion
from mdt_fast.models.zoo import build_model
from mdt_fast.training.distributed import World
from mdt_fast.training.objective import draw, losses_of, total_loss
from mdt_fast.training.optim import build_optimizer
from mdt_fast.training.parallelize import parallelize, split
from ranks import run_ranks
from tiny import tiny

KINDS = {
    "_allgather_base_": ("all_gather", 0, 1),
    "_reduce_scatter_base_": ("reduce_scatter", 1, 0),
    "allreduce_": ("all_reduce", 0, 0),
}
"""Torch's collectives: kind, which argument is the whole buffer, and which this process's part."""


class Collectives(TorchDispatchMode):
    """Within ``with``, records each collective's kind, and the bytes of the whole and of the own buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, int, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            kind, whole, own = KINDS[func.overloadpacket._qualified_op_name.partition("::")[2]]
            self.found.append((kind, _bytes(args[whole]), _bytes(args[own])))
        return func(*args, **(kwargs or {}))


def _bytes(argument: Any) -> int:
    tensors = argument if isinstance(argument, list | tuple) else [argument]
    return sum(t.numel() * t.element_size() for t in tensors)


@dataclass(frozen=True)
class Case:
    """A training step of ``world`` processes, ``on_node`` on each machine."""

    world: int
    on_node: int
    parallel: str
    dtype: str = "float32"
    packed: bool = True
    checkpointing: str = "none"

    def __str__(self) -> str:
        return "-".join(
            [f"{self.world}x{self.parallel}{self.on_node}", self.dtype]
            + ["separate"] * (not self.packed)
            + [self.checkpointing] * (self.checkpointing != "none")
        )

    @property
    def config(self) -> RunConfig:
        """Five blocks, one of them the side block; sizes that do not divide evenly."""
        config = tiny(
            parallel=self.parallel,
            dtype=self.dtype,
            checkpointing=self.checkpointing,
            batch_size=2 * self.world,
        )
        return replace(config, model=replace(config.model, input_size=12, depth=4, decode_layer=2))


@dataclass(frozen=True)
class Counted:
    """``groups``: how many modules FSDP2 gathers; ``passes`` and ``update``: the collectives of a step."""

    groups: int
    passes: list[tuple[str, int, int]]
    update: list[tuple[str, int, int]]

    def number(self, kind: str) -> int:
        return sum(found[0] == kind for found in self.passes)


def count(folder: Path, world: int, cases: list[Case]) -> dict[str, Counted]:
    """Each case's second step; all processes must agree on it."""
    run_ranks(folder, _count, str(folder), [asdict(case) for case in cases], world=world)
    found = json.loads((folder / "counted.json").read_text())
    return {
        name: Counted(one["groups"], *([tuple(row) for row in one[key]] for key in ("passes", "update")))
        for name, one in found.items()
    }


def _count(rank: int, folder: str, cases: list[dict[str, Any]]) -> None:
    found = {}
    for case in (Case(**settings) for settings in cases):
        found[str(case)] = asdict(_step(rank, case))
        everyones: list[Any] = [None] * case.world
        dist.all_gather_object(everyones, found[str(case)])
        assert all(one == everyones[0] for one in everyones)
    if rank == 0:
        (Path(folder) / "counted.json").write_text(json.dumps(found))


def _step(rank: int, case: Case) -> Counted:
    """A step built from the trainer's own parts."""
    config, device = case.config, torch.device("cpu")
    settings = config.train
    torch.manual_seed(0)
    model: Any = build_model(config.model).train()
    model.set_switches(Switches(packed=case.packed))
    world = World(rank, case.world, rank % case.on_node, case.on_node)
    assert parallelize(model, settings, world, device)
    optimizer, diffusion = build_optimizer(model.parameters(), settings), create_diffusion()
    own = split(slice(0, settings.batch_size), case.world)[rank]
    x = torch.randn(settings.batch_size, 1, 12, 12)[own]
    y = torch.arange(settings.batch_size)[own] % 10
    for _ in range(2):  # the first one sets up
        draws = draw(model, diffusion, settings.batch_size, device).rows(own)
        with Collectives() as passes:
            total_loss(losses_of(model, diffusion, x, y, draws)).backward()
        with Collectives() as update:
            optimizer.step()
        optimizer.zero_grad()
    groups = sum(isinstance(module, FSDPModule) for module in model.modules())
    return Counted(groups, passes.found, update.found)
