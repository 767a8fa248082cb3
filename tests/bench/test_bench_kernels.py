"""Timing the ops of the rooms: a whole run at tiny sizes, its rows, its picture, and every mistake."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import kernels
import ops
import optimizers
import plots
import points
from mdt_fast.kernels import backends
from measure import Timing
from providers import Skip
from rows import KEYS, read


@pytest.fixture
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "TOKENS", 16)
    monkeypatch.setattr(ops, "KEPT", 9)
    monkeypatch.setitem(ops.WIDTHS, "S", 16)
    monkeypatch.setattr(optimizers, "shapes", lambda model: [torch.Size([16, 9]), torch.Size([5])])


def test_every_op_is_in_the_bench() -> None:
    """Attention has its own bench; the norm is part of the optimisers' steps."""
    elsewhere = {"rel_attention", "rel_attention_qkvpacked", "grad_sumsq"}
    assert {*ops.cases("S", 1), *optimizers.PROVIDERS} == {row.op for row in backends()} - elsewhere


@pytest.mark.parametrize(("model", "millions"), [("S", (33, 50)), ("XL", (280, 300))])
def test_optimisers_step_over_a_published_model(model: str, millions: tuple[int, int]) -> None:
    sizes = optimizers.shapes(model)
    assert millions[0] <= sum(size.numel() for size in sizes) / 1e6 <= millions[1]
    assert torch.Size([384 if model == "S" else 1152]) in sizes


@pytest.mark.parametrize("op", optimizers.PROVIDERS)
def test_providers_of_a_step_agree_after_several(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimizers, "shapes", lambda model: [torch.Size([16, 9]), torch.Size([5])])
    found = {}
    for name, make in optimizers.point(op, "S").prepare(torch.device("cpu")).items():
        try:
            call = make()
        except Skip:
            assert name in ("timm", "apex")
            continue
        found[name] = [call() for _ in range(5)][-1]
    assert {"fast", "eager"} <= found.keys()
    assert all(points.difference(results, found["eager"]) < 1e-5 for results in found.values())


@pytest.mark.usefixtures("_tiny")
def test_what_cannot_be_captured_is_launched_and_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As on a GPU, with a stand-in for graphs."""
    replayed: list[str] = []

    def capture(call: points.Call) -> points.Call:
        if not replayed:
            replayed.append("one")
            return call
        raise RuntimeError("it waits for the device")

    made = points.Session.__init__

    def init(self: points.Session, *args: Any) -> None:
        made(self, *args)
        self.capture = capture

    monkeypatch.setattr(points.Session, "__init__", init)
    flags = ["--device", "cpu", "--repeats", "5", "--model", "S", "--ops", "gather_tokens", "--mode", "fwd"]
    assert kernels.main([*flags, "--providers", "fast,eager"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "eager fwd: launched kernel by kernel, not replayed from a graph" in out
    assert "it waits for the device" in out
    assert "fast fwd: launched" not in out


@pytest.mark.usefixtures("_tiny")
def test_a_run_leaves_rows_tables_and_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows_file, picture = tmp_path / "rows.jsonl", tmp_path / "picture.png"
    flags = ["--device", "cpu", "--repeats", "5", "--json", str(rows_file), "--plot", str(picture)]
    assert kernels.main(flags) == 0
    rows = read([rows_file])
    assert all({*KEYS, "op", "shape"} <= set(row) and row["bench"] == "kernels" for row in rows)
    left_out = {row["provider"] for row in rows if row["metric"] in ("failed", "skipped")}
    assert left_out <= {"timm", "apex", "float8"}
    assert {row["provider"] for row in rows if row["op"] == "adamw_step"} >= {"fast", "eager", "fused"}
    for op, case in ops.cases("S", 2).items():
        for mode in case.modes:
            for provider in ("fast", "eager"):
                found = {
                    row["metric"]: row
                    for row in rows
                    if (row["op"], row["mode"], row["provider"]) == (op, mode, provider)
                }
                metrics = {"ms", "gb_per_s", "roof_share", "ratio"} | (
                    {"tflop_per_s"} if any(case.flops) else set()
                )
                assert set(found) == metrics
                assert found["ms"]["shape"] == case.shape
                assert all(
                    row["rounds"] == 5 and row["p20"] <= row["p50"] <= row["p80"] for row in found.values()
                )
                moved = case.point(mode, torch.float32).bytes
                assert found["gb_per_s"]["p50"] == pytest.approx(moved / 1e6 / found["ms"]["p50"])
                assert (provider == "eager") == (found["ratio"]["p20"] == found["ratio"]["p80"] == 1.0)
    fast = next(row for row in rows if row["provider"] == "fast")
    assert fast["switches"] == {"backend": next(row.backend for row in backends() if row.op == fast["op"])}
    copies = [row for row in rows if row["op"] == "copy"]
    timed = sum(len(case.modes) for case in ops.cases("S", 2).values()) + len(optimizers.PROVIDERS)
    assert len(copies) == timed
    out = capsys.readouterr().out
    assert "ln_modulate · B 2, L 16, D 16 · float32" in out
    assert "the smallest sizes, as this is a CPU" in out
    assert "roof of fwd+bwd: copy of" in out
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert not plots.draw_attention(rows, tmp_path / "none.png")


@pytest.mark.gpu
def test_every_op_agrees_and_is_timed_on_a_gpu(tmp_path: Path) -> None:
    rows_file = tmp_path / "rows.jsonl"
    flags = [
        "--model",
        "S",
        "--batch",
        "2",
        "--providers",
        "fast,eager",
        "--repeats",
        "5",
        "--device",
        "cuda",
    ]
    assert kernels.main([*flags, "--json", str(rows_file)]) == 0
    rows = read([rows_file])
    assert not [row for row in rows if row["metric"] in ("failed", "skipped")]
    measured = {row["op"] for row in rows} - {"copy", "matmul"}
    assert measured - set(optimizers.PROVIDERS) == set(ops.cases("S", 1))
    assert {row["driver"] for row in rows} != {None}


@pytest.mark.usefixtures("_tiny")
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_types_are_halves_of_the_bytes(dtype: str, tmp_path: Path) -> None:
    rows_file = tmp_path / "rows.jsonl"
    flags = ["--ops", "ln_modulate,gather_tokens", "--dtype", dtype, "--repeats", "1", "--device", "cpu"]
    assert kernels.main([*flags, "--json", str(rows_file)]) == 0
    rows = read([rows_file])
    copied = [row["shape"]["bytes"] for row in rows if row["op"] == "copy"]
    N, kept, all_tokens = 2 * 16 * 16, 2 * 9 * 16, 2 * 16 * 16
    assert copied == [2 * 2 * N, 2 * 5 * N, 2 * 2 * kept, 2 * (3 * kept + all_tokens)]
    assert {row["note"] for row in rows if row["metric"] == "ratio"} == {
        "too few rounds (1; a ratio takes 5)"
    }


@pytest.mark.usefixtures("_tiny")
def test_an_op_that_is_wrong_is_not_timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    right = ops.kernels.bias_gelu
    monkeypatch.setattr(ops.kernels, "bias_gelu", lambda x, bias: 1.01 * right(x, bias))
    rows_file = tmp_path / "rows.jsonl"
    flags = ["--ops", "bias_gelu", "--mode", "fwd", "--repeats", "1", "--device", "cpu"]
    assert kernels.main([*flags, "--json", str(rows_file)]) == 0
    (row,) = (row for row in read([rows_file]) if row["provider"] == "fast")
    assert row["metric"] == "failed"
    assert row["note"] == "disagrees with eager: off by 1.0e-02 relative, allowed 2e-03"


@pytest.mark.usefixtures("_tiny")
def test_an_op_that_fails_does_not_stop_the_others(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*arguments: object) -> None:
        raise RuntimeError("no kernel\nand a long trace")

    monkeypatch.setattr(ops.kernels, "bias_gelu", fail)
    assert kernels.main(["--ops", "bias_gelu", "--repeats", "1", "--device", "cpu"]) == 0
    assert "fast fwd, fast fwd+bwd: failed: RuntimeError: no kernel\n" in capsys.readouterr().out
    assert kernels.main(["--ops", "bias_gelu", "--providers", "fast", "--device", "cpu"]) == 1


@pytest.mark.usefixtures("_tiny")
def test_after_the_time_limit_points_are_skipped(tmp_path: Path) -> None:
    rows_file = tmp_path / "rows.jsonl"
    flags = ["--ops", "bias_gelu", "--time-limit", "1e-9", "--device", "cpu", "--json", str(rows_file)]
    assert kernels.main(flags) == 1
    rows = read([rows_file])
    assert [row["metric"] for row in rows] == ["skipped"] * 4
    assert rows[0]["note"] == "the time limit was reached before its turn"


@pytest.mark.usefixtures("_tiny")
def test_shares_and_ratios_are_taken_round_by_round(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seconds = {"copy": [1.0] * 5, "eager": [2.0, 2.0, 2.0, 8.0, 8.0], "fast": [1.0, 2.0, 2.0, 4.0, 4.0]}

    def turns(turns: dict, *args: object, **kwargs: object) -> dict[str, Timing]:
        return {name: Timing(seconds[name], list(range(5))) for name in turns}

    monkeypatch.setattr(points, "take_turns", turns)
    rows_file = tmp_path / "rows.jsonl"
    flags = ["--ops", "bias_gelu", "--mode", "fwd", "--device", "cpu", "--json", str(rows_file)]
    assert kernels.main(flags) == 0
    found = {row["metric"]: row for row in read([rows_file]) if row["provider"] == "fast"}
    assert [found["ratio"][key] for key in ("p20", "p50", "p80")] == [1.0, 2.0, 2.0]
    assert [found["roof_share"][key] for key in ("p20", "p50", "p80")] == pytest.approx([0.25, 0.5, 0.6])


def test_compiled_where_there_is_no_compiler(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ops, "compile_obstacle", lambda device: "no compiler here")
    flags = ["--ops", "bias_gelu", "--providers", "compile", "--device", "cpu", "--batch", "1"]
    assert kernels.main(flags) == 1
    assert "compile fwd, compile fwd+bwd: skipped: no compiler here" in capsys.readouterr().out


def test_ctrl_c_keeps_the_rows_made(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(points.Session, "evaluate", interrupt)
    rows_file = tmp_path / "rows.jsonl"
    flags = ["--ops", "bias_gelu", "--batch", "1", "--repeats", "1", "--device", "cpu"]
    assert kernels.main([*flags, "--json", str(rows_file)]) == 130
    assert len(read([rows_file])) == 1
    assert "kernels: interrupted; 1 rows so far are in" in capsys.readouterr().err


MISTAKES = {
    "ops": (["--ops", "ln_modulat"], "--ops: got 'ln_modulat' (did you mean 'ln_modulate'?), expected"),
    "provider": (["--providers", "fats"], "--providers: got 'fats' (did you mean 'fast'?), expected"),
    "dtype": (["--dtype", "half"], "--dtype: got 'half', expected float32, float16, bfloat16"),
    "mode": (["--mode", "bwd"], "--mode: got 'bwd' (did you mean 'fwd'?), expected fwd, fwd+bwd"),
    "no-backward": (["--ops", "cfg_step", "--mode", "fwd+bwd"], "--mode: cfg_step has no backward pass"),
    "model": (["--model", "M"], "--model: got 'M', expected S, B, L, XL"),
    "batch": (["--batch", "0"], "--batch: got '0', expected an integer, 1 or more"),
    "repeats": (["--repeats", "0"], "--repeats: got 0, expected 1 or more"),
    "time-limit": (["--time-limit", "0"], "--time-limit: got 0.0, expected a positive number of seconds"),
    "threads": (["--threads", "-1"], "--threads: got -1, expected 1 to 1024"),
    "many-threads": (["--threads", "99999999999"], "--threads: got 99999999999, expected 1 to 1024"),
    "device": (["--device", "gpu"], "--device: got 'gpu', expected auto, cpu, cuda or cuda:N"),
    "json": (["--json", "/no/such/folder/rows.jsonl"], "--json: cannot write '/no/such/folder/rows.jsonl'"),
    "plot": (["--plot", "picture.jpg"], "--plot: got 'picture.jpg', expected a file that ends in .png"),
    "option": (["--op", "x"], "unrecognized arguments: --op x"),
    "arch": (["--arch", "sm_90"], "--arch: only with --aot"),
    "aot": (["--aot", "--ops", "bias_gelu"], "--ops: not with --aot, which times nothing"),
    "aot-time-limit": (["--aot", "--time-limit", "3"], "--time-limit: not with --aot"),
}  # fmt: skip


@pytest.mark.parametrize(("flags", "message"), MISTAKES.values(), ids=MISTAKES.keys())
def test_mistakes_are_one_line(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert kernels.main(flags) == 2
    out, err = capsys.readouterr()
    assert err.startswith(f"kernels: error: {message}")
    assert err.count("\n") == 1
    assert out == ""


def test_the_script_runs_from_any_directory(tmp_path: Path) -> None:
    command = [sys.executable, kernels.__file__, "--ops", "none"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("kernels: error: --ops: got 'none', expected linear,")
