"""Processes that each hold all weights: gradients summed after the passes, with graphs as without them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from mdt_fast.diffusion import create_diffusion
from mdt_fast.models.zoo import build_model
from mdt_fast.training import passes, run
from mdt_fast.training.distributed import World
from mdt_fast.training.objective import draw
from mdt_fast.training.parallelize import ALONE_BYTES, BUCKET_BYTES, same_weights, sum_gradients
from ranks import run_ranks
from replayed import Replayed
from tiny import tiny
from tolerances import FLOAT32, relative_error

pytestmark = pytest.mark.slow

LARGE = ALONE_BYTES // 4 + 1


def parameters(rank: int) -> list[nn.Parameter]:
    """Gradients of all sizes, dtypes and layouts, and a parameter without; the numbers differ by replica."""
    draw = torch.Generator().manual_seed(rank)
    found = []
    for shape, dtype in (
        ((LARGE,), torch.float32), ((3, 5), torch.float32), ((1,), torch.float32), ((0, 4), torch.float32),
        ((7,), torch.bfloat16), ((LARGE, 2), torch.bfloat16), ((2, 3), torch.float16), ((), torch.float32),
        ((BUCKET_BYTES // 4 - 3,), torch.bfloat16), ((11,), torch.float32),
    ):  # fmt: skip
        parameter = nn.Parameter(torch.zeros(shape, dtype=dtype))
        parameter.grad = torch.randn(shape, generator=draw).to(dtype)
        found.append(parameter)
    apart = nn.Parameter(torch.zeros(LARGE, 2))
    apart.grad = torch.randn(2, LARGE, generator=draw).t()
    return [*found, nn.Parameter(torch.zeros(2)), apart]


def gradients(ps: list[nn.Parameter]) -> list[Tensor | None]:
    return [p.grad for p in ps]


def sum_by_two(rank: int) -> None:
    ours = parameters(rank)
    memory = [None if g is None else g.data_ptr() for g in gradients(ours)]
    sum_gradients(ours)
    assert memory == [None if g is None else g.data_ptr() for g in gradients(ours)]
    for mine, a, b in zip(gradients(ours), *map(gradients, map(parameters, (0, 1))), strict=True):
        if mine is None or a is None or b is None:
            assert mine is a is b is None
        else:
            assert torch.equal(mine, (a.float() + b.float()).to(mine.dtype))  # rounded once
    model = nn.Linear(3, 4)
    nn.init.constant_(model.weight, rank + 1.0)
    same_weights(model)
    assert model.weight.eq(1).all()


def step(rows: slice, replicas: int, graphed: bool, changes: dict[str, Any]) -> dict[str, Tensor]:
    """Gradients of a model from these rows of a batch of eight."""
    config = tiny(accumulate=2, **changes)
    config = replace(config, model=replace(config.model, patch_size=2))
    torch.manual_seed(0)
    model, diffusion = build_model(config.model).train(), create_diffusion()
    torch.manual_seed(1)
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) * 0.1
    batch, y = torch.randn(8, config.model.in_channels, 8, 8), torch.arange(8) % 3
    draws = draw(model, diffusion, 8, torch.device("cpu"))
    made: Any = passes.Passes(model, diffusion, config.train, False, torch.device("cpu"), replicas)
    made = passes.GraphedPasses(made) if graphed else made
    made.zero_grad()
    half = (rows.stop - rows.start) // 2
    for first in (rows.start, rows.start + half):
        part = slice(first, first + half)
        made(batch[part], y[part], draws.rows(part), None, last=first > rows.start)
    if replicas > 1:
        sum_gradients(model.parameters())
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def prepare_as_another(rank: int, folder: Path) -> None:
    """A replica that starts out differently, by another library say, gets the first one's weights."""
    derive = run.derive_seed
    run.derive_seed = lambda *parts: derive(*parts) + rank
    world = World(rank, 2, rank, 2, dist.group.WORLD, dist.group.WORLD)
    config = tiny(parallel="ddp", batch_size=8)
    weights = run.prepare(config, folder / "run", None, world).model.state_dict()
    run.derive_seed = derive
    everyones: list[Any] = [None, None]
    dist.all_gather_object(everyones, weights)
    assert all(torch.equal(everyones[0][name], everyones[1][name]) for name in weights)


CHANGES: tuple[dict[str, Any], ...] = ({}, {"passes": "in_turn"})


def work_of_two(rank: int, folder: Path) -> None:
    """Gradients are summed in place; a step's are the same bits on both, with graphs and without."""
    sum_by_two(rank)
    prepare_as_another(rank, folder)
    passes.Graphed = Replayed
    rows, found = slice(4 * rank, 4 * rank + 4), []
    for changes in CHANGES:
        plain, graphed = step(rows, 2, False, changes), step(rows, 2, True, changes)
        assert all(torch.equal(plain[name], graphed[name]) for name in plain)
        everyones: list[Any] = [None, None]
        dist.all_gather_object(everyones, graphed)
        assert all(torch.equal(everyones[0][name], everyones[1][name]) for name in plain)
        found.append(plain)
    torch.save(found, folder / "gradients.pt")


def test_two_replicas_have_the_gradients_of_one_process(tmp_path: Path) -> None:
    """Accumulated from parts; two processes do all checks in one launch, which takes longer than they do."""
    run_ranks(tmp_path, work_of_two, tmp_path)
    for changes, ours in zip(CHANGES, torch.load(tmp_path / "gradients.pt"), strict=True):
        expected = step(slice(0, 8), 1, False, changes)
        assert ours.keys() == expected.keys()
        for name, gradient in expected.items():
            assert relative_error(ours[name], gradient) <= 2 * FLOAT32, name
