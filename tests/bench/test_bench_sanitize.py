"""The sanitizer's calls on a CPU, and the messages where it cannot run."""

import os
from pathlib import Path

import pytest
import torch

import sanitize
from rows import read


def test_every_call_runs_here(capsys: pytest.CaptureFixture[str]) -> None:
    assert sanitize.main(["--device", "cpu", "--ops", "ln_modulate,tokens,mask_plan,optim"]) == 0
    out = capsys.readouterr().out
    assert "ln_modulate gated linear ragged float32: ran" in out
    assert "mask_plan 7 of 1030 float32: ran" in out


def test_parts_share_the_calls(capsys: pytest.CaptureFixture[str]) -> None:
    said = []
    for part in ("1/1", "1/2", "2/2"):
        assert sanitize.main(["--device", "cpu", "--ops", "mask_plan", "--part", part]) == 0
        said.append([line for line in capsys.readouterr().out.splitlines() if line.endswith(": ran")])
    assert sorted(said[1] + said[2]) == sorted(said[0])
    assert len(said[0]) > len(said[1]) >= len(said[2]) > 0


def test_a_kernel_that_no_call_reaches_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sanitize, "INTERPRETING", True)
    monkeypatch.setattr(sanitize, "triton_kernels", lambda: [("cfg_step", "cfg_step_kernel")])
    monkeypatch.setattr(sanitize, "calls", lambda asked, device: [])
    assert sanitize.main(["--device", "cpu", "--ops", "cfg_step"]) == 1
    assert "not reached: cfg_step_kernel" in capsys.readouterr().out


@pytest.mark.parametrize("code", [0, sanitize.FOUND])
def test_its_outcome_is_a_row(code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "bin" / "compute-sanitizer"
    tool.parent.mkdir()
    tool.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/asked\nexit {code}\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}:{os.environ['PATH']}")
    monkeypatch.setattr("command.device", lambda text: torch.device("cuda"))
    monkeypatch.setattr("sanitize.machine", lambda device, line: row)
    row = dict.fromkeys(("device", "driver", "torch", "triton", "commit", "command"), "")
    rows_file = tmp_path / "rows.jsonl"
    jobs = ["--jobs", "2"] if code else []
    assert sanitize.main(["--tool", "racecheck", "--json", str(rows_file), *jobs]) == (code != 0)
    (found,) = read([rows_file])
    assert (found["op"], found["p50"]) == ("racecheck", float(code == 0))
    assert "--tool racecheck --error-exitcode 9" in (tmp_path / "asked").read_text()


MISTAKES = {
    "--tool memchek --device cpu": "--tool: got 'memchek', expected memcheck",
    "--tool memcheck --device cpu": "--tool: needs a CUDA device",
    "--ops nothing": "--ops: got 'nothing'",
    "--part 3/2 --device cpu": "--part: got '3/2', expected I/N with 1 <= I <= N",
    "--jobs 0 --device cpu": "--jobs: got 0, expected 1 or more",
}


@pytest.mark.parametrize("asked", MISTAKES)
def test_mistakes(asked: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert sanitize.main(asked.split()) == 2
    assert MISTAKES[asked] in capsys.readouterr().err


def test_where_there_is_no_sanitizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setattr("command.device", lambda text: torch.device("cuda"))
    monkeypatch.setattr("sanitize.machine", lambda device, line: {})
    assert sanitize.main(["--tool", "memcheck"]) == 2
    assert "compute-sanitizer was not found" in capsys.readouterr().err
