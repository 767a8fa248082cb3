"""A step's passes as graphs, with a stand-in for CUDA's: what is copied, what is kept, what is refused."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mdt_fast.config import RunConfig
from mdt_fast.errors import UserError
from mdt_fast.training import passes, run, train
from mdt_fast.training.metrics import read_rows
from replayed import Replayed
from tiny import tensors_of, tiny


@pytest.fixture
def on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes, "Graphed", Replayed)
    monkeypatch.setattr(run, "passes_of", lambda made, processes: passes.GraphedPasses(made))
    monkeypatch.setattr(Replayed, "made", [])


@pytest.mark.parametrize(
    ("family", "settings"),
    [("mdtv2", {}), ("mdtv2", {"accumulate": 2}), ("mdtv2", {"dtype": "float16"}), ("dit", {})],
    ids=str,
)
def test_graphs_train_to_the_same_bits(
    family: str, settings: dict[str, Any], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Several lengths, each captured once; a picture and the average between."""
    config = of_family(tiny(log_every=1, lr=1e-2, steps=6, save_every=3, **settings), family)
    train(config, tmp_path / "plain")
    request.getfixturevalue("on_a_cpu")
    train(config, tmp_path / "graphed")
    lengths = len(Replayed.made[0].captured)
    assert lengths == 1 if family == "dit" else lengths > 1
    step = Path("checkpoints", "step_0000006")
    assert tensors_of(tmp_path / "graphed" / step) == tensors_of(tmp_path / "plain" / step)
    plain, graphed = (read_rows(tmp_path / name / "metrics.jsonl") for name in ("plain", "graphed"))
    for expected, row in zip(plain, graphed, strict=True):
        assert {key: row[key] for key in row if "loss" in key} == {
            key: expected[key] for key in expected if "loss" in key
        }


def of_family(config: RunConfig, family: str) -> RunConfig:
    changes: dict[str, Any] = {"patch_size": 2}  # 16 tokens, for several lengths
    if family == "dit":
        changes |= {"family": "dit", "mask_ratio": None, "decode_layer": 0}
    return replace(config, model=replace(config.model, **changes))


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"train.cuda_graphs: for a CUDA device, got 'cpu'"):
        train(tiny(cuda_graphs=True), tmp_path / "out")
    assert not (tmp_path / "out" / "metrics.jsonl").exists()
    made = passes.Passes(None, None, tiny(cuda_graphs=True).train, True, torch.device("cuda"))
    with pytest.raises(UserError, match=r"train.cuda_graphs: for one process, got 2"):
        passes.passes_of(made, 2)
