"""A step's passes as graphs, with a stand-in for CUDA's: what is copied, kept and refused."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from mdt_fast.config import RunConfig
from mdt_fast.diffusion import create_diffusion
from mdt_fast.errors import UserError
from mdt_fast.models.zoo import build_model
from mdt_fast.training import passes, run, train
from mdt_fast.training.metrics import read_rows
from mdt_fast.training.objective import draw
from replayed import Replayed
from tiny import tensors_of, tiny


@pytest.fixture
def on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes, "Graphed", Replayed)
    monkeypatch.setattr(run, "passes_of", passes.GraphedPasses)
    monkeypatch.setattr(Replayed, "made", [])


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("mdtv2", {}),
        ("mdtv2", {"accumulate": 2}),
        ("mdtv2", {"dtype": "float16"}),
        ("mdtv2", {"passes": "in_turn"}),
        ("dit", {}),
    ],
    ids=str,
)
def test_graphs_train_to_the_same_bits(
    family: str, settings: dict[str, Any], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Several lengths, each captured once; a picture and the average in between."""
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
    changes: dict[str, Any] = {"patch_size": 2}  # 16 tokens, for several possible lengths
    if family == "dit":
        changes |= {"family": "dit", "mask_ratio": None, "decode_layer": 0}
    return replace(config, model=replace(config.model, **changes))


EMPTY: Any = SimpleNamespace(every_block=lambda: ())
"""A model without blocks."""


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"train.cuda_graphs: needs a CUDA device, got 'cpu'"):
        train(tiny(cuda_graphs=True), tmp_path / "out")
    assert not (tmp_path / "out" / "metrics.jsonl").exists()
    made = passes.Passes(EMPTY, None, tiny(cuda_graphs=True).train, True, torch.device("cuda"))
    with pytest.raises(UserError, match=r"train.cuda_graphs: needs one process, or train.parallel ddp"):
        passes.passes_of(made)


def test_graphs_are_hinted_at_where_they_go_and_are_not() -> None:
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    for graphs, sharded, device, hinted in (
        (False, False, gpu, True), (True, False, gpu, False), (False, True, gpu, False),
        (False, False, cpu, False),
    ):  # fmt: skip
        made = passes.Passes(EMPTY, None, tiny(cuda_graphs=graphs).train, sharded, device)
        assert [hint.startswith("hint: ") for hint in passes.hints(made)] == [True] * hinted


@pytest.mark.parametrize("family", ["mdtv2", "mdt", "dit"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_passes_in_turn_have_the_same_gradients(family: str, accumulate: int) -> None:
    """In turn they hold less at once: what one pass keeps is freed before the next."""
    config = of_family(tiny(accumulate=accumulate), family)
    found = []
    for name in ("together", "in_turn"):
        torch.manual_seed(0)
        model = build_model(config.model).double().train()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        x, y = torch.randn(6, 1, 8, 8, dtype=torch.float64), torch.arange(6)
        diffusion, kept = create_diffusion(), Kept()
        draws = draw(model, diffusion, 6, torch.device("cpu"))
        settings = replace(config.train, passes=name)
        one = passes.Passes(model, diffusion, settings, False, torch.device("cpu"))
        with kept:
            terms = one(x, y, draws, torch.tensor(64.0, dtype=torch.float64))
        found.append((terms, [p.grad for p in model.parameters()], kept.most))
    (terms, gradients, most), (terms_in_turn, gradients_in_turn, most_in_turn) = found
    assert terms.keys() == terms_in_turn.keys()
    for a, e in zip(
        [*terms_in_turn.values(), *gradients_in_turn], [*terms.values(), *gradients], strict=True
    ):
        torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-11)
    assert most_in_turn == most if family == "dit" else most_in_turn < 0.7 * most


class Kept(saved_tensors_hooks):
    """``most``: the largest number of bytes kept for the backward pass at once."""

    def __init__(self) -> None:
        self.held = self.most = 0
        super().__init__(self.pack, lambda kept: kept.tensor)

    def pack(self, tensor: torch.Tensor) -> "Kept.One":
        return Kept.One(self, tensor)

    class One:
        def __init__(self, of: "Kept", tensor: torch.Tensor):
            self.of, self.tensor = of, tensor
            of.held += tensor.numel() * tensor.element_size()
            of.most = max(of.most, of.held)

        def __del__(self) -> None:
            self.of.held -= self.tensor.numel() * self.tensor.element_size()
