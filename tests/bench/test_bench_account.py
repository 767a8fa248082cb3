"""``throughput.py --account``: what a step costs, counted at toy size."""

from pathlib import Path

import pytest

import throughput
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
    blocks = 6  # of which the side block runs in the masked pass only
    assert reference["gathers"] == 2 * (2 * blocks + 1)
    assert fast["gathers"] == 2 * (blocks + 1)
    assert found["fast without packed"]["gathers"] == reference["gathers"]
    assert found["fast without masked_side"]["flops"] > fast["flops"]
    assert found["fast without thin_skip"]["flops"] > fast["flops"]
    for switch in ("fused_adaln", "fused_mlp"):
        assert found[f"fast without {switch}"]["saved_bytes"] > fast["saved_bytes"]
    assert all(line["ms"] > 0 for line in found.values())
