"""Tuning: what is tried, what the machine code shows, who wins, what is written. Times need a GPU."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import candidates
import promise
import tune
import winners
from mdt_fast.kernels import launches
from mdt_fast.kernels.ln_modulate import config as ln_config
from rows import RowFile, machine, read

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")

ENTRY = ("gate_residual_fwd", "2048 half")


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
def test_every_compiled_choice_can_be_tuned(arch: str) -> None:
    entries = candidates.entries(arch)
    without = {"quantize_rows", "quantize_weight"} if arch == "sm_80" else set()  # A100 has no float8
    assert {kernel for kernel, _ in entries} == set(candidates.KERNELS) - without
    for entry in entries:
        assert entry[1].split()[1] in ("half", "float32", "tf32")
    assert {"64 half", "80 half", "80 tf32"} <= {
        shape for kernel, shape in entries if kernel == "rel_attention_bwd_kv"
    }


@pytest.mark.parametrize("kernel", candidates.KERNELS)
def test_choices_are_few_different_and_what_config_takes(kernel: str) -> None:
    choices = [*candidates.KERNELS[kernel].choices()]
    assert choices[0] == {}
    assert 4 <= len(choices) <= 100
    assert len({winners.key_of(choice) for choice in choices}) == len(choices)
    entry = next(entry for entry in candidates.entries("sm_90") if entry[0] == kernel)
    present = candidates.cases(entry, "sm_90", {})
    forced = candidates.cases(entry, "sm_90", choices[-1])
    assert [case.label for case in present] == [case.label for case in forced]
    assert not launches._forced


def test_every_published_shape_is_timed() -> None:
    cpu = torch.device("cpu")
    assert set(candidates.calls(("ln_modulate_fwd", "1024 half"), 32, cpu)) == {"B, batch 32", "L, batch 32"}
    assert set(candidates.calls(("bias_gelu_bwd", "8192 half"), 4, cpu)) == {"XL, batch 4"}
    attention = candidates.calls(("rel_attention_fwd", "80 half"), 32, cpu)
    assert set(attention) == {"d=72 all, batch 32", "d=72 kept, batch 32"}
    assert not candidates.calls(("patch_embed_fwd", "256 half"), 32, cpu)  # patch 8: no published model


def test_tuned_data_is_read_and_what_it_does_not_say_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    table = {"ln_modulate_fwd": {"sm_90": {"2048 half": {"each": 8}}}}
    monkeypatch.setattr(launches, "table", lambda: table)
    assert launches.tuned_for(("ln_modulate_fwd", "2048 half"), "sm_90") == {"each": 8}
    assert launches.tuned_for(("ln_modulate_fwd", "2048 half"), "sm_80") == {}
    assert launches.chosen(dict, "ln_modulate_fwd", torch.zeros(1, dtype=torch.float16), 2048) == {}
    (tuned, *_), (default, *_) = (
        candidates.cases(("ln_modulate_fwd", "2048 half"), arch, {}) for arch in ("sm_90", "sm_80")
    )
    assert (tuned.num_warps, default.num_warps) == (8, 4)
    assert tuned.constants == default.constants


def test_the_data_file_names_what_exists() -> None:
    for kernel, by_arch in launches.table().items():
        for arch, by_shape in by_arch.items():
            for shape, choice in by_shape.items():
                assert (kernel, shape) in candidates.entries(arch)
                assert choice.keys() == candidates.KERNELS[kernel].space.keys()


def test_defaults_are_what_they_were() -> None:
    config = ln_config.launch_config(1152, 32, 256)
    assert (config.block_d, config.programs, config.num_warps) == (2048, 64, 4)
    assert ln_config.thin_config(1152, 32, 256).num_warps == 8


def row(**changes: Any) -> dict[str, Any]:
    common = machine(torch.device("cpu"), "python bench/tune.py") | {"device": "a GPU"}
    fields = {
        "bench": "tune", "op": ENTRY[0], "shape": ENTRY[1], "arch": "sm_90", "provider": "triton",
        "mode": "fwd", "dtype": "half", "metric": "ratio", "unit": "1", "point": "XL, batch 32",
        "rounds": 30, "source": winners.source_of(ENTRY[0]), "switches": {"each": 4, "programs": 2048},
        "p20": 1.05, "p50": 1.1, "p80": 1.2, "time": "",
    }  # fmt: skip
    return common | fields | changes


def test_the_best_choice_that_was_timed_everywhere_wins() -> None:
    elsewhere = {"point": "S, batch 32"}
    fast, slow = {"each": 4, "programs": 1024}, {"each": 16, "programs": 1024}
    rows = [
        row(), row(**elsewhere),
        row(switches=fast, p50=1.3), row(switches=fast, p50=1.2, **elsewhere),
        row(switches=slow, p50=9.0),  # at one point only
        row(switches=slow, p50=9.0, rounds=2, **elsewhere),
        row(switches={"each": 8, "programs": 1}, p50=5.0, source="of older code"),
    ]  # fmt: skip
    (ranked,) = winners.winners(rows, list(candidates.KERNELS))
    assert [one.choice for one in ranked] == [fast, {"each": 4, "programs": 2048}]
    assert ranked[0].gain == pytest.approx((1.3 * 1.2) ** 0.5)
    assert ranked[0].worth_it
    (again,) = winners.winners([*rows, row(switches=fast, p50=0.5)], list(candidates.KERNELS))
    assert again[0].choice == {"each": 4, "programs": 2048}, "the latest row counts"


@pytest.mark.parametrize(("p20", "p50"), [(0.98, 1.1), (1.005, 1.01)], ids=["within noise", "under 2%"])
def test_what_is_not_clearly_faster_changes_nothing(p20: float, p50: float, capsys: Any) -> None:
    winners.conclude([row(p20=p20, p50=p50)], list(candidates.KERNELS), write=True)
    assert "the current one stays" in capsys.readouterr().out
    assert json.loads(launches.TUNED.read_text()) == launches.table()


def test_winners_are_written_beside_what_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data, rows_file = tmp_path / "tuned.json", tmp_path / "rows.jsonl"
    data.write_text('{"cfg_step": {"sm_80": {"4096 half": {"each": 4, "widest": 512}}}}')
    rows_file.write_text(json.dumps(row()) + "\n")
    monkeypatch.setattr(launches, "TUNED", data)
    monkeypatch.setattr(winners, "outcome_of", lambda job: {"registers": 32})
    assert tune.main(["--report", "--write", "--json", str(rows_file)]) == 0
    assert "each=4, programs=2048" in capsys.readouterr().out
    written = json.loads(data.read_text())
    assert written["gate_residual_fwd"] == {"sm_90": {"2048 half": {"each": 4, "programs": 2048}}}
    assert written["cfg_step"]["sm_80"]["4096 half"] == {"each": 4, "widest": 512}
    monkeypatch.setattr(winners, "outcome_of", lambda job: "spills 8 B")
    assert tune.main(["--report", "--write", "--json", str(rows_file)]) == 0
    assert "the current one stays" in capsys.readouterr().out


def test_machine_code_ranks_without_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows_file = tmp_path / "rows.jsonl"
    asked = ["--ops", "gather_tokens_fwd", "--dtype", "float32", "--arch", "sm_90", "--jobs", "1"]
    assert tune.main(["--compile-only", *asked, "--json", str(rows_file)]) == 0
    assert "gather_tokens_fwd 2048 float32 on sm_90" in capsys.readouterr().out
    rows = read([rows_file])
    assert [one["metric"] for one in rows] == ["registers"] * 5
    assert {one["switches"].get("each") for one in rows} == {None, 4, 8, 16, 32}
    assert all(one["occupancy"] > 0 and one["spill_bytes"] == 0 for one in rows)


def test_promise() -> None:
    good = {"occupancy": 0.5, "registers": 64, "LDG": 4, "LDG.128": 4}
    ranked = ["spills 8 B", good | {"occupancy": 0.9, "HMMA": 8}, good | {"LDG.128": 0}, good]
    assert sorted(ranked, key=promise.promise) == [ranked[3], ranked[2], ranked[1], ranked[0]]
    assert promise.worst_of([good, "spills 8 B"]) == "spills 8 B"
    assert promise.worst_of([good, good | {"occupancy": 0.1}]) == good | {"occupancy": 0.1}


MISTAKES = {
    "": "no CUDA device here",
    "--ops nothing": "--ops: got 'nothing'",
    "--dtype bf16": "--dtype: got 'bf16'",
    "--compile-only --arch sm_91": "--arch: unknown 'sm_91'",
    "--compile-only --write": "--write: not with --compile-only",
    "--report": "--report: needs --json FILE",
    "--report --json nope.jsonl": "--json: no file 'nope.jsonl'; --report reads the rows of earlier runs",
    "--arch sm_90": "--arch: only with --compile-only",
    "--compile-only --ops sum_rows --sizes 7": "--sizes: '7' names no shape class of sum_chunks",
    "--top 0": "--top: got '0'",
}


@pytest.mark.parametrize("asked", MISTAKES)
def test_mistakes(asked: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tune.main(asked.split()) == 2
    said = capsys.readouterr().err
    assert MISTAKES[asked] in said
    assert len(said.splitlines()) == 1


def test_rows_of_a_file_are_not_measured_again(tmp_path: Path) -> None:
    common = machine(torch.device("cpu"), "") | {"device": "a GPU"}
    known = [row(), row(source="of older code", switches={"each": 8}), row(device="another")]
    bench = tune.Tuner(RowFile(None, common), known, "sm_90", torch.device("cpu"), None, 0.0)
    assert bench.done(ENTRY) == {("XL, batch 32", winners.key_of({"each": 4, "programs": 2048}))}
