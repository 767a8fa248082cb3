"""Diffusers' DiT as a provider: the reference's outputs and gradients on the same weights."""

import importlib.util
from pathlib import Path

import pytest
import torch

import providers
import throughput
from mdt_fast.config import ModelConfig
from rows import read

DIT = ModelConfig.of(
    "dit", input_size=8, patch_size=2, in_channels=4, hidden_size=32, depth=3, num_heads=2, num_classes=10
)
CPU = torch.device("cpu")
needs_diffusers = pytest.mark.skipif(importlib.util.find_spec("diffusers") is None, reason="needs diffusers")


@needs_diffusers
def test_it_computes_what_the_reference_does() -> None:
    modules = providers.Modules(DIT, CPU, None)
    x, t = torch.randn(4, 4, 8, 8), torch.tensor([0, 3, 500, 999])
    y = torch.tensor([1, 9, 10, 10])
    found = []
    for name in ("reference", "diffusers"):
        provider = providers.make(name, modules)
        provider.module.eval()
        out = provider.forward(x, t, y)
        out.square().sum().backward()
        norm = torch.stack([p.grad.norm() for p in provider.module.parameters() if p.grad is not None]).norm()
        guided = provider.forward_with_cfg(x, t, y, cfg_scale=3.0)
        found.append((out.detach(), guided.detach(), norm))
    for ours, theirs in zip(*found):
        torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-5)


def test_other_models_are_skipped() -> None:
    modules = providers.Modules(providers.model_config("digits"), CPU, None)
    with pytest.raises(providers.Skip, match="diffusers has no mdtv2, only DiT"):
        providers.make("diffusers", modules)


@needs_diffusers
def test_it_takes_its_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(providers, "model_config", lambda name: DIT)
    rows_file = tmp_path / "rows.jsonl"
    asked = [
        "--model",
        "DiT_S_2",
        "--batch",
        "2",
        "--providers",
        "reference,diffusers",
        "--data",
        "synthetic",
    ]
    assert throughput.main([*asked, "--device", "cpu", "--repeats", "2", "--json", str(rows_file)]) == 0
    rows = read([rows_file])
    measured = {(row["provider"], row["mode"]) for row in rows if row["metric"] == "img_per_s"}
    assert measured == {(p, m) for p in ("reference", "diffusers") for m in ("train", "sample")}, [
        row.get("note") for row in rows
    ]
