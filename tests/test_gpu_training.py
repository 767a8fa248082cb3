"""Training on a GPU: passes as CUDA graphs give the same numbers as one operation after the other."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from mdt_fast.cuda_graphs import Graphed
from mdt_fast.kernels.float8.registered import multiplies
from mdt_fast.kernels.native import library
from mdt_fast.training import parallelize, passes, train
from mdt_fast.training.metrics import read_rows
from mdt_fast.training.run import Run
from measure import pool_bytes
from tiny import LEAN, tiny

pytestmark = pytest.mark.gpu
LEAN_BY_CSRC = pytest.param(
    LEAN, marks=pytest.mark.skipif(not library("cuda"), reason="csrc is not built for CUDA")
)
FLOAT8 = pytest.param(
    {"dtype": "bfloat16", "float8": True},
    marks=pytest.mark.skipif(
        torch.cuda.is_available() and not multiplies(torch.device("cuda")),
        reason="this GPU has no products in float8",
    ),
)


@pytest.mark.parametrize(
    "settings",
    [
        {"dtype": "float32"},
        {"dtype": "bfloat16"},
        {"dtype": "float16", "accumulate": 2},
        {"dtype": "bfloat16", "checkpointing": "selective"},
        {"dtype": "bfloat16", "compile": "block"},
        {"dtype": "bfloat16", "passes": "in_turn"},
        LEAN_BY_CSRC,
        FLOAT8,
    ],
    ids=str,
)
def test_graphs_train_to_the_same_numbers(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """New lengths are captured, known ones replayed, and pictures are drawn in between."""
    made: list[passes.GraphedPasses] = []
    build = passes.GraphedPasses.__init__

    def noticed(self: passes.GraphedPasses, *args: Any) -> None:
        made.append(self)
        build(self, *args)

    monkeypatch.setattr(passes.GraphedPasses, "__init__", noticed)
    config = tiny(device="cuda", log_every=1, lr=1e-2, steps=20, save_every=10, batch_size=8, **settings)
    config = replace(config, model=replace(config.model, hidden_size=64, patch_size=2))
    for name, graphs in (("plain", False), ("graphed", True)):
        torch._dynamo.reset()
        train(replace(config, train=replace(config.train, cuda_graphs=graphs)), tmp_path / name)
    assert 1 < len(made[0].graphed.captured) < 20
    allowed = 1e-4 if settings["dtype"] == "float32" else 1e-2
    rows = [read_rows(tmp_path / name / "metrics.jsonl") for name in ("plain", "graphed")]
    for expected, row in zip(*rows, strict=True):
        for key in ("loss", "m_loss", "grad_norm"):
            assert row[key] == pytest.approx(expected[key], rel=allowed)


@pytest.mark.parametrize(
    "settings",
    [
        {"dtype": "bfloat16"},
        {"dtype": "float16", "accumulate": 2},
        LEAN_BY_CSRC,
    ],
    ids=str,
)
def test_nccl_sums_gradients_in_the_memory_of_graphs(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a group of one process, where the sum changes no number."""
    config = tiny(device="cuda", log_every=1, lr=1e-2, steps=8, cuda_graphs=True, **settings)
    config = replace(config, model=replace(config.model, hidden_size=64, patch_size=2))
    train(config, tmp_path / "alone")
    file = f"file://{tmp_path / 'rendezvous'}"
    dist.init_process_group("nccl", init_method=file, rank=0, world_size=1)
    try:
        monkeypatch.setattr(Run, "replicas", property(lambda self: 2))
        monkeypatch.setattr(parallelize, "ALONE_BYTES", 1024)  # sums in the graph's memory, too
        train(config, tmp_path / "summed")
    finally:
        dist.destroy_process_group()
    alone, summed = (read_rows(tmp_path / name / "metrics.jsonl") for name in ("alone", "summed"))
    for expected, row in zip(alone, summed, strict=True):
        assert {key: row[key] for key in ("loss", "m_loss", "grad_norm")} == {
            key: expected[key] for key in ("loss", "m_loss", "grad_norm")
        }


def test_graphs_of_several_shapes_share_their_memory() -> None:
    """A second shape is warmed up in the memory of the first one's graph: 1 GiB of activations."""
    weight = torch.randn(1024, 1024, device="cuda", requires_grad=True)

    def step(x: Tensor) -> Tensor:
        hidden = x
        for _ in range(16):  # 64 MiB each, kept for the backward pass
            hidden = (hidden @ weight).tanh()
        loss = hidden.square().mean()
        (gradient,) = torch.autograd.grad(loss, weight)
        return torch.stack([loss, gradient.norm()])

    graphed = Graphed(step, torch.device("cuda"))
    for rows in (16384, 16000, 15000):
        x = torch.randn(rows, 1024, device="cuda")
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved()
        torch.cuda.reset_peak_memory_stats()
        values = graphed(x).clone()
        if len(graphed.captured) > 1:
            assert torch.cuda.max_memory_reserved() <= before + 512 * 2**20
        torch.testing.assert_close(values, step(x), rtol=1e-4, atol=0)
    assert len(graphed.captured) == 3
    assert 2**30 <= pool_bytes(graphed.pool) <= torch.cuda.memory_reserved()
