"""``bench/scaling.py``: the table, where compute times come from, the document's tables, refusals."""

from pathlib import Path

import pytest
import torch

import scaling
from rows import RowFile, machine

SMALL = ["--model", "MDTv2_S_2", "--gpus", "8,64"]


def test_a_line_for_each_model_mode_and_number(capsys: pytest.CaptureFixture[str]) -> None:
    assert scaling.main([*SMALL, "--mfu", "0.5"]) == 0
    out = capsys.readouterr().out
    assert "50% of peak assumed" in out
    assert [line.split()[:3] for line in out.splitlines() if line.startswith("MDTv2_S_2")] == [
        ["MDTv2_S_2", mode, gpus] for mode in ("fsdp", "hybrid") for gpus in ("8", "64")
    ]


def test_measured_steps_come_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """For this GPU and dtype, at the nearest batch, by the fastest provider."""
    rows = RowFile(
        tmp_path / "rows.jsonl", machine(torch.device("cpu"), "x") | {"device": "NVIDIA H100 80GB"}
    )
    fields = {"bench": "throughput", "model": "MDTv2_S_2", "mode": "train", "metric": "ms", "unit": "ms/step"}
    for provider, batch, dtype, ms in (
        ("fast", 16, "bfloat16", 8.0),
        ("fast-compiled", 16, "bfloat16", 7.0),
        ("fast-lean-graphs", 16, "bfloat16", 2.0),
        ("fast-float8-graphs", 16, "bfloat16", 1.0),
        ("fast-in-turn", 16, "bfloat16", 6.0),
        ("fast with recompute", 16, "bfloat16", 1.0),
        ("fast", 256, "bfloat16", 1.0),
        ("fast", 32, "float32", 1.0),
        ("reference", 32, "bfloat16", 1.0),
    ):
        rows.add((ms, ms, ms), **fields, provider=provider, batch=batch, dtype=dtype, switches={})
    options = [*SMALL, "--rows", str(tmp_path / "rows.jsonl")]
    assert scaling.main(options) == 0
    said = " ".join(capsys.readouterr().out.split())
    measured = "ms measured at batch 16 (NVIDIA H100 80GB)"
    assert f"7 {measured}, not sharded 2 {measured}" in said  # FSDP has no graphs
    assert scaling.main([*options, "--mode", "ddp,fsdp", "--gpus", "8"]) == 0
    lines = {
        line.split()[1]: line.split() for line in capsys.readouterr().out.splitlines() if "MDTv2_S_2 " in line
    }
    assert float(lines["fsdp"][3]) > 14
    assert 4 < float(lines["ddp"][3]) < 7
    assert scaling.main([*options, "--gpu", "a100"]) == 0
    assert "40% of peak assumed" in capsys.readouterr().out


def test_the_documents_tables_go_between_its_markers(tmp_path: Path) -> None:
    path = tmp_path / "scaling.md"
    path.write_text(f"before\n{scaling.BEGIN}\nold\n{scaling.END}\nafter\n")
    assert scaling.main([*SMALL, "--step-ms", "6", "--markdown", str(path)]) == 0
    text = path.read_text()
    assert text.startswith("before\n")
    assert text.endswith(f"{scaling.END}\nafter\n")
    assert "old" not in text
    assert "6 ms given" in text
    assert "| MDTv2_S_2 | hybrid |" in text
    assert "fsdp, two passes" in text
    assert [p.name for p in tmp_path.iterdir()] == ["scaling.md"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--gpus", "0"], "--gpus: got '0', expected an integer, 1 or more"),
        (["--gpus", "20"], "--gpus: 20 is not divisible by --gpus-per-node 8; the nearest that is: 16"),
        (["--gpus-per-node", "0"], "--gpus-per-node: got 0, expected 1 or more"),
        (["--network", "-400"], "--network: got -400.0, expected a positive number of Gbit/s"),
        (["--network-per", "rack"], "--network-per: got 'rack', expected gpu, node"),
        (["--link-share", "80"], "--link-share: got 80.0, expected a number above 0, up to 1"),
        (["--mfu", "40"], "--mfu: got 40.0, expected a number above 0, up to 1"),
        (["--gpu", "h10"], "--gpu: got 'h10' (did you mean 'h100'?), expected a100, h100, h200, b200"),
        (["--gpu", "h100,a100"], "--gpu: got 'h100,a100', expected one of a100, h100, h200, b200"),
        (["--batch", "0"], "--batch: got 0, expected 1 or more"),
        (["--target", "1"], "--target: got 1.0, expected a number between 0 and 1"),
        (["--mfu", "1", "--step-ms", "5"], "--step-ms: needs a single --model, and no --mfu"),
        (["--markdown", "missing.md"], "--markdown: cannot read 'missing.md': No such file or directory"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)  # fmt: skip
def test_refusals(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert scaling.main([*SMALL, *flags]) == 2
    assert capsys.readouterr() == ("", f"scaling: error: {message}\n")
