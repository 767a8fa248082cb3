"""``throughput.py --account``: what a step costs, counted at toy size."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import account
import throughput
from mdt_fast.training import passes
from replayed import Replayed
from rows import read

FLAGS = ["--account", "--model", "digits", "--batch", "4", "--device", "cpu"]


@pytest.mark.slow
def test_every_switch_has_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "rows.jsonl"
    assert throughput.main([*FLAGS, "--json", str(file)]) == 0
    table = capsys.readouterr().out
    found: dict[str, dict[str, float]] = {}
    for row in read([file]):
        assert row["bench"] == "account"
        found.setdefault(row["note"], {})[row["metric"]] = row["p50"]
    assert all(name in table for name in found)
    assert {"reference", "fast", "fast without any", "fast with batched_adaln"} <= found.keys()
    assert len(found) == 14
    reference, fast, plain = (found[name] for name in ("reference", "fast", "fast without any"))
    assert fast["flops"] < reference["flops"] == plain["flops"]
    assert fast["saved_bytes"] < 0.7 * reference["saved_bytes"]
    assert fast["peak_bytes"] < 0.8 * reference["peak_bytes"]
    assert fast["ops"] < 0.75 * reference["ops"]
    blocks = 6  # the side block runs in the masked pass only
    assert reference["gathers"] == 2 * (2 * blocks + 1)
    assert fast["gathers"] == 2 * (blocks + 1)
    assert found["fast without packed"]["gathers"] == reference["gathers"]
    assert found["fast without masked_side"]["flops"] > fast["flops"]
    assert found["fast without thin_skip"]["flops"] > fast["flops"]
    for switch in ("fused_adaln", "fused_mlp"):
        assert found[f"fast without {switch}"]["saved_bytes"] > fast["saved_bytes"]
    assert all(line["ms"] > 0 for line in found.values())


@pytest.mark.slow
def test_on_a_gpu_each_line_is_timed_as_a_graph(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    make, turned = account.make, ("fast", "fast without packed", "fast without fused_mlp")

    def on_a_cpu(name: str, modules: Any) -> Any:
        return replace(make(name.removesuffix("-graphs"), modules), name=name)

    class Sometimes(Replayed):
        def __call__(self, *args: Any) -> Any:
            if len(self.made) == 2:
                raise RuntimeError("cannot be captured")
            return super().__call__(*args)

    lines = account.settings
    monkeypatch.setattr(
        account, "settings", lambda module: [one for one in lines(module) if one[0] in turned]
    )
    monkeypatch.setattr(account, "make", on_a_cpu)
    monkeypatch.setattr(passes, "Graphed", Sometimes)
    monkeypatch.setattr(Replayed, "made", [])
    file = tmp_path / "rows.jsonl"
    assert throughput.main([*FLAGS, "--json", str(file)]) == 0
    said = capsys.readouterr().out
    timed = [row["note"] for row in read([file]) if row["metric"] == "graph_ms"]
    assert timed == ["fast", "fast without fused_mlp"]
    assert "fast without packed: no CUDA graph: RuntimeError: cannot be captured" in said
    assert "ms, one graph" in said
    assert len(Replayed.made) == 3
