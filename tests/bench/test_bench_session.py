"""A case from start to rows: what stays behind, what is known after a failure, how turns are divided."""

from pathlib import Path

import pytest
import torch

import account
import account_sampling
import providers
import session
import steps
import throughput
from mdt_fast.config import ModelConfig
from rows import RowFile, read

CPU = torch.device("cpu")
TINY = ModelConfig(
    input_size=8, patch_size=2, in_channels=1, hidden_size=32, depth=2, num_heads=2, num_classes=10,
    decode_layer=0,
)  # fmt: skip


def run_of(names: list[str], mode: str = "train") -> tuple[session.CaseResult, providers.Modules]:
    case = steps.Case("tiny", TINY, mode, 2, torch.float32, CPU)
    modules = providers.Modules(TINY, CPU, None)
    images = throughput.inputs.load("synthetic", TINY, 2)
    result = session.Session(RowFile(None, {}), lambda text: None).run(
        case, names, modules, images, repeats=1, inner=None, deadline=float("inf"), skipped={}
    )
    return result, modules


@pytest.mark.parametrize("names", [["reference", "fast"], ["fast"]], ids=str)
def test_no_gradients_are_left(names: list[str]) -> None:
    """Gradients of a step that is a CUDA graph would keep all of its memory from the next one; nor may the
    reference's stay if it is not among the providers."""
    result, modules = run_of(names)
    assert [one.ms is not None and one.peak_bytes is not None for one in result.results] == [True] * len(
        names
    )
    made = modules._made.values()
    assert len(made) == 2
    assert all(p.grad is None for module in made for p in module.parameters())


def test_a_reference_that_fails_ends_its_case_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outcome = steps.TrainStep.outcome

    def short(step: steps.TrainStep) -> tuple[torch.Tensor, ...]:
        if step.case.batch == 3:
            raise torch.OutOfMemoryError("no memory")
        return outcome(step)

    monkeypatch.setattr(steps.TrainStep, "outcome", short)
    monkeypatch.setattr("providers.model_config", lambda name: TINY)
    file = tmp_path / "rows.jsonl"
    flags = ["--model", "digits", "--batch", "3,2", "--repeats", "2", "--device", "cpu", "--mode", "train"]
    assert throughput.main([*flags, "--providers", "reference,fast", "--json", str(file)]) == 0
    rows = [row for row in read([file]) if "op" not in row]
    failed = {row["provider"]: row["note"] for row in rows if row["metric"] == "failed"}
    assert set(failed) == {"reference", "fast"}
    assert failed["fast"] == "no reference to compare with: OutOfMemoryError: no memory"
    assert {row["batch"] for row in rows if row["metric"] == "img_per_s"} == {2}


def test_quick_steps_are_repeated_in_a_turn() -> None:
    """Up to 50 ms, which on a GPU hides the host's work, but no longer than the slowest takes."""
    assert session.repeated({"slow": 0.3, "quick": 0.007, "tiny": 0.001}, 1) == {
        "slow": 1,
        "quick": 7,
        "tiny": 20,
    }
    assert session.repeated({"slow": 0.02, "quick": 0.007}, 5) == {"slow": 1, "quick": 1}
    assert session.repeated({"alone": 0.007}, 7) == {"alone": 1}


def test_a_line_that_fails_leaves_the_others(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the account of a step, and in that of sampling."""
    monkeypatch.setattr("providers.compile_obstacle", lambda device: "not in this test")
    peak, kept = account_sampling.peak_bytes, ("fast", "fast without any")

    def short(draw: account_sampling.Draw, device: torch.device) -> int:
        seen.append(draw)
        if len(seen) == 2:
            raise torch.OutOfMemoryError("no memory")
        return peak(draw, device)

    for name in ("account", "account_sampling"):
        module = __import__(name)
        lines = module.settings
        monkeypatch.setattr(
            module, "settings", lambda one, lines=lines: [x for x in lines(one) if x[0] in kept]
        )
        monkeypatch.setattr(module, "peak_bytes", short)
        seen: list[account_sampling.Draw] = []
        file = tmp_path / f"{name}.jsonl"
        flags = ["--account", "--model", "digits", "--batch", "2", "--device", "cpu", "--json", str(file)]
        flags += [] if name == "account" else ["--mode", "sample", "--repeats", "1"]
        assert throughput.main([*flags, "--dtype", "float32"]) == 0
        assert "fast: OutOfMemoryError: no memory" in capsys.readouterr().out
        assert {row["note"] for row in read([file])} == {"reference", "fast without any"}


@pytest.mark.parametrize("mode", ["train", "sample"])
def test_an_account_goes_on_after_a_reference_that_failed(
    mode: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("providers.compile_obstacle", lambda device: "not in this test")
    module = account if mode == "train" else account_sampling
    run = module.run

    def short(case: steps.Case, *rest: object, **more: object) -> object:
        if case.batch == 3:
            raise torch.OutOfMemoryError("no memory")
        return run(case, *rest, **more)

    monkeypatch.setattr(module, "run", short)
    monkeypatch.setattr("providers.model_config", lambda name: TINY)
    file = tmp_path / "rows.jsonl"
    flags = ["--account", "--model", "digits", "--batch", "3,2", "--device", "cpu", "--json", str(file)]
    assert throughput.main([*flags, "--mode", mode, *["--repeats", "1"] * (mode == "sample")]) == 1
    assert "batch 3 · float32: OutOfMemoryError: no memory" in capsys.readouterr().out
    assert {row["batch"] for row in read([file])} == {2}
