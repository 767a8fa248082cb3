"""``throughput.py --mode sample --account``: what makes sampling fast, at toy size."""

from pathlib import Path

import pytest
import torch

import account_sampling
import throughput
from mdt_fast.config import SampleConfig, SampleSwitches
from mdt_fast.models.float8 import use_float8
from providers import Modules, make, model_config
from rows import read
from steps import CFG_SCALE, Case


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_item_has_a_line_and_the_same_picture(
    dtype: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("providers.compile_obstacle", lambda device: "not in this test")
    monkeypatch.setattr("providers.use_float8", lambda module, by: use_float8(module, by, emulate=True))
    file = tmp_path / "rows.jsonl"
    flags = ["--account", "--mode", "sample", "--model", "digits", "--batch", "2", "--device", "cpu"]
    assert throughput.main([*flags, "--dtype", dtype, "--repeats", "1", "--json", str(file)]) == 0
    table = capsys.readouterr().out
    found: dict[str, dict[str, float]] = {}
    for row in read([file]):
        assert (row["bench"], row["mode"]) == ("account", "sample")
        found.setdefault(row["note"], {})[row["metric"]] = row["p50"]
    assert all(name in table for name in found)
    assert "reference-compiled: not in this test" in table
    half = dtype == "bfloat16"
    items = ("batched_modulations", "shared_embedding", "fused_step", "skip_unit", *["cast_once"] * half)
    assert set(found) == {
        "reference", "fast", *(f"fast without {item}" for item in items), "fast without any",
        "fast with skip_below 0.001", *["fast with bfloat16 weights", "fast in float8"] * half,
    }  # fmt: skip
    fast = found["fast"]
    assert fast["ops"] < found["fast without fused_step"]["ops"] < found["fast without any"]["ops"]
    assert fast["ops"] < found["fast without batched_modulations"]["ops"] < found["reference"]["ops"]
    assert all(line["off"] < (1e-2 if half else 1e-3) and line["ms"] > 0 for line in found.values())
    if half:
        assert found["fast with bfloat16 weights"]["ops"] < fast["ops"]
        assert found["fast in float8"]["off"] not in (fast["off"], found["fast with bfloat16 weights"]["off"])
        assert found["fast with bfloat16 weights"]["off"] > found["reference"]["off"]


def test_a_line_that_this_device_cannot_have_is_listed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(account_sampling, "settings", lambda config: [("fast", config, SampleSwitches())])
    monkeypatch.setattr("providers.compile_obstacle", lambda device: "not in this test")
    options = ["--model=digits", "--batch=2", "--device=cpu", "--dtype=bfloat16", "--repeats=1"]
    assert throughput.main(["--account", "--mode=sample", *options]) == 0
    assert "fast in float8: float8: needs a GPU" in capsys.readouterr().out


def test_diffusers_transformer_draws_the_same_picture() -> None:
    pytest.importorskip("diffusers")
    config = model_config("DiT_S_8")
    case = Case("DiT_S_8", config, "sample", 1, torch.float32, torch.device("cpu"))
    how = SampleConfig(steps=2, cfg_scale=CFG_SCALE, scale_pow=None)
    modules = Modules(config, case.device, None)
    pictures = []
    for name in ("reference", "diffusers"):
        provider = make(name, modules)
        provider.module.eval()
        pictures.append(account_sampling.published(case, provider.forward_with_cfg, how, [3])(0))
    ours, theirs = pictures
    assert (theirs - ours).norm() < account_sampling.OFF[torch.float32] * ours.norm()
