"""The goals' table and pictures from made-up rows: met, missed, not measured; slower results stand out."""

from pathlib import Path
from typing import Any

import pytest
import torch

import goals
import report
import roofline
from rows import RowFile, machine
from sanitize import CALLS

GPU = machine(torch.device("cpu"), "python bench/throughput.py") | {
    "device": "an H200", "driver": "999", "commit": "0123456789",
}  # fmt: skip
SHAPE = {"B": 32, "H": 16, "L": 256}


def rows_of(*fields: dict[str, Any], **common: Any) -> list[dict[str, Any]]:
    file = RowFile(None, GPU | {"switches": {}, "unit": "1", "rounds": 9})
    for some in fields:
        values = some | common
        p50 = values.pop("p50")
        file.add((0.9 * p50, p50, 1.1 * p50), **values)
    return file.rows


def models(provider: str, img_per_s: float, gib: float = 1.0, **changes: Any) -> list[dict[str, Any]]:
    case = {"bench": "throughput", "model": "MDTv2_XL_2", "provider": provider, "mode": "train", "batch": 32,
            "dtype": "bfloat16"} | changes  # fmt: skip
    return rows_of(
        {"metric": "img_per_s", "p50": img_per_s}, {"metric": "peak_bytes", "p50": gib * 2**30}, **case
    )


def attention(provider: str, ms: float, **changes: Any) -> list[dict[str, Any]]:
    case = {"bench": "attention", "op": "rel_attention", "provider": provider, "mode": "fwd",
            "shape": SHAPE | {"d": 64}, "dtype": "bfloat16"} | changes  # fmt: skip
    return rows_of({"metric": "ms", "p50": ms}, {"metric": "tflop_per_s", "p50": 100 / ms}, **case)


def said(rows: list[dict[str, Any]], goal: str) -> str:
    (line,) = [line for line in goals.table(rows).splitlines() if line.startswith(f"| {goal} |")]
    return line


def test_nothing_measured() -> None:
    lines = goals.table([]).splitlines()
    assert len(lines) == 2 + len(goals.GOALS)
    assert all(line.endswith("| | not measured | |") for line in lines[2:])


def test_models() -> None:
    rows = models("reference", 100) + models("reference", 30, dtype="float32")
    rows += models("reference-compiled", 200, 10) + models("fast", 290, 5) + models("fast-compiled", 370, 4)
    rows += models("fast", 500, batch=64)
    assert "| 500 img/s (fast, batch 64) | met |" in said(rows, "train XL/2, bfloat16, one H200")
    assert "| 12.33x (fast-compiled, batch 32) | met |" in said(rows, "train XL/2 over eager float32")
    assert "| 3.70x (fast-compiled, batch 32) | met |" in said(rows, "train XL/2 over eager bfloat16")
    assert "| 1.85x (fast-compiled over reference-compiled, batch 32) | met |" in said(
        rows, "train XL/2 over compiled bfloat16"
    )
    expected = "| 0.40x (fast-compiled over reference-compiled, batch 32) | met |"
    assert expected in said(rows, "peak memory, XL/2, batch 32, over compiled")
    assert said(rows, "train XL/2 at batch 4 over compiled").endswith("| not measured | |")
    rows += models("fast", 10, 9, batch=4) + models("reference-compiled", 5, batch=4)
    expected, goal = (
        "| 2.00x (fast over reference-compiled, batch 4) |",
        "train XL/2 at batch 4 over compiled",
    )
    assert f"{expected} **missed** | an H200 |" in said(rows, goal)
    assert expected in said(rows + models("fast", 10, batch=4), goal)
    rows += models("reference-blocks-compiled", 8, batch=4)
    assert "| 1.25x (fast over reference-blocks-compiled, batch 4) |" in said(rows, goal)
    assert said(rows, "CPU, train S/2 over eager, float32").endswith("| not measured | |")


def test_float8_has_a_goal_of_its_own() -> None:
    rows = models("fast-float8-graphs", 490) + models("fast-lean-graphs", 370)
    assert "| 370 img/s (fast-lean-graphs, batch 32) | met |" in said(rows, "train XL/2, bfloat16, one H200")
    assert "| 490 img/s (fast-float8-graphs, batch 32) | met |" in said(rows, "train XL/2, float8, one H200")


def test_runs_are_told_apart() -> None:
    """On a CPU nothing is compared across runs."""

    def on_a_cpu(command: str, provider: str, img_per_s: float, gib: float = 1.0) -> list[dict[str, Any]]:
        made = models(provider, img_per_s, gib, model="MDTv2_S_2", batch=8, dtype="float32")
        return [row | {"device": "a CPU", "driver": None, "command": command} for row in made]

    speed, peak = "CPU, train S/2 over eager, float32", "CPU, peak memory of S/2 over eager, float32"
    rows = [*on_a_cpu("first", "reference", 10), *on_a_cpu("first", "fast", 14, 0.7)]
    assert "| 1.40x (fast, batch 8) | met |" in said(rows, speed)
    rows += on_a_cpu("second", "reference", 20)
    assert "| 1.40x (fast, batch 8) | met |" in said(rows, speed), "of the run that has both"
    rows += [row | {"time": "9999"} for row in on_a_cpu("second", "fast-compiled", 26, 0.5)]
    assert "| 1.30x (fast-compiled, batch 8) | met |" in said(rows, speed)
    assert "| 0.50x (fast-compiled, batch 8) | met |" in said(rows, peak)
    rows = [*models("reference-compiled", 200), *(r | {"command": "other"} for r in models("fast", 300))]
    expected = "| 1.50x (fast over reference-compiled, batch 32; of two runs) | met |"
    goal = "train XL/2 over compiled bfloat16"
    assert expected in said(rows, goal)
    for change in ({"commit": "another"}, {"command": "python bench/throughput.py --lengths 2"}):
        assert said([*rows[:2], *(row | change for row in rows[2:])], goal).endswith("| not measured | |")


def test_an_older_pair_of_one_run_counts_and_says_so() -> None:
    rows = models("reference-compiled", 100, 10) + models("fast", 200, 6)
    later = {"commit": "later", "time": "9999"}
    rows += [row | later for row in models("fast", 290, 4)]
    expected = "| 2.00x (fast over reference-compiled, batch 32; of an earlier run) | met |"
    assert expected in said(rows, "train XL/2 over compiled bfloat16")
    expected = "| 0.60x (fast over reference-compiled, batch 32; of an earlier run) | **missed** |"
    assert expected in said(rows, "peak memory, XL/2, batch 32, over compiled")


def test_the_ratio_of_one_run_is_by_rounds() -> None:
    rows = models("reference", 100) + models("fast", 390)
    common = {key: rows[0][key] for key in ("bench", "model", "mode", "batch", "dtype")}
    rows += rows_of({"metric": "ratio", "p50": 3.7}, provider="fast", **common)
    goal = "train XL/2 over eager bfloat16"
    assert "| 3.70x (fast, batch 32) |" in said(rows, goal)
    rows[0]["command"] = "another"
    assert "| 3.90x (fast, batch 32; of two runs) |" in said(rows, goal)


def test_few_rounds_say_so_and_replace_no_more() -> None:
    goal = "train XL/2 over eager bfloat16"
    rows = [*models("reference", 100), *models("fast", 390)]
    again = [row | {"rounds": 1} for row in (*models("reference", 100), *models("fast", 420))]
    assert "| 4.20x (fast, batch 32; too few rounds) |" in said(again, goal)
    assert "| 3.90x (fast, batch 32) |" in said(rows + again, goal)
    assert "| 3.90x (fast, batch 32; too few rounds) |" in said([*again[:2], *rows[2:]], goal)


def test_a_step_by_itself_counts_and_says_so() -> None:
    step = {"bench": "breakdown", "metric": "ms", "model": "MDTv2_XL_2", "dtype": "bfloat16"}
    rows = rows_of(
        {"provider": "fast-graphs", "mode": "train", "batch": 32, "p50": 100.0},
        {"provider": "fast-graphs", "mode": "train", "batch": 128, "p50": 320.0},
        **step,
    )
    goal, case = "train XL/2, bfloat16, one H200", "fast-graphs, batch 128, one step over and over"
    assert f"| 400 img/s ({case}) |" in said(rows, goal)
    rows[1]["commit"] += "-dirty"
    assert f"| 400 img/s ({case}; of files that no commit holds) |" in said(rows[1:], goal)
    assert "| 320 img/s (fast-graphs, batch 32, one step over and over) |" in said(rows, goal)
    lines = [("fast", 32.0), ("fast with bfloat16 weights", 40.0), ("fast with skip_below 0.001", 10.0)]
    common = step | {"bench": "account", "mode": "sample", "provider": "fast", "batch": 32}
    rows = rows_of(*({"note": note, "p50": ms} for note, ms in lines), **common)
    rows[0]["rounds"] = 3
    assert "| 4 img/s (fast, batch 32, by ten steps; too few rounds) | met |" in said(
        rows, "sample XL/2, 250 steps, one H200"
    )


def test_a_rate_is_asked_of_the_gpu_that_it_was_set_for() -> None:
    rows = [row | {"device": "NVIDIA H100"} for row in (*models("reference", 100), *models("fast", 500))]
    assert "| not measured |" in said(rows, "train XL/2, bfloat16, one H200")
    assert "| 5.00x (fast, batch 32) | met | NVIDIA H100 |" in said(rows, "train XL/2 over eager bfloat16")


def test_attention_by_its_worst_case() -> None:
    rows = (
        attention("sdpa-no-bias", 0.9)
        + attention("triton-dense-store", 1.0)
        + attention("triton-packed", 3.0)
    )
    masked = {"shape": SHAPE | {"d": 72, "K": 153}}
    rows += attention("sdpa-no-bias", 0.7, **masked) + attention("triton-packed", 1.0, **masked)
    rows += attention("flex", 2.5)
    assert "| 0.70x (fwd, d=72, masked) | **missed** |" in said(
        rows, "attention forward over attention without bias"
    )
    assert "| 2.50x (fwd, d=64, all tokens) | met |" in said(rows, "attention over FlexAttention")


def test_kernels_ops_and_sanitizer() -> None:
    op = {
        "bench": "kernels",
        "provider": "fast",
        "dtype": "bfloat16",
        "shape": {"B": 1},
        "metric": "roof_share",
    }
    shares = [("ln_modulate", "fwd", 0.9), ("gate_residual", "fwd+bwd", 0.8), ("adan_step", "fwd", 0.87)]
    rows = rows_of(*({"op": name, "mode": mode, "p50": share} for name, mode, share in shares), **op)
    assert "| 80% (gate_residual fwd+bwd) | **missed** |" in said(rows, "adaLN kernels, of the copy's rate")
    assert "| 87% (adan_step fwd) | met |" in said(rows, "optimiser steps, of the copy's rate")
    clean = {"bench": "sanitize", "metric": "clean", "shape": ",".join(CALLS)}
    rows = rows_of({"op": "memcheck", "p50": 1.0}, **clean)
    goal = "compute-sanitizer, memcheck and racecheck: clean"
    assert said(rows, goal).endswith("not measured | |")
    some = rows_of({"op": "racecheck", "p50": 1.0}, **clean | {"shape": ",".join(CALLS[1:])})
    part = rows_of({"op": "memcheck", "p50": 1.0}, **clean | {"shape": ",".join(CALLS[1:])})
    assert f"| 100% (memcheck; without {CALLS[0]}) | met so far | an H200 |" in said(part + some, goal)
    assert "| 0% (racecheck) | **missed** |" in said(
        rows + some + rows_of({"op": "racecheck", "p50": 0.0}, **clean), goal
    )


def test_operations_are_compared_at_one_batch() -> None:
    steps = {"bench": "account", "metric": "ops", "mode": "train", "model": "MDTv2_XL_2"}
    rows = rows_of(
        {"provider": "reference", "note": "reference", "batch": 4, "p50": 1000},
        {"provider": "fast", "note": "fast", "batch": 4, "p50": 240},
        {"provider": "reference", "note": "reference", "batch": 32, "p50": 1200},
        {"provider": "fast", "note": "fast with batched_adaln", "batch": 32, "p50": 264},
        {"provider": "fast", "note": "fast", "batch": 128, "p50": 200},
        **steps,
    )
    expected = "| 0.22x (fast with batched_adaln, batch 32) | met |"
    goal = "ops dispatched in a training step over eager"
    assert expected in said(rows, goal)
    rows = [row | {"model": "MDTv2_S_2"} for row in rows]
    rows[1]["p50"] = 290
    assert "| 0.29x (fast, batch 4; of MDTv2_S_2, not MDTv2_XL_2) | **missed** |" in said(rows, goal)


def test_rows_of_no_commit() -> None:
    rows = [row | {"commit": None} for row in models("fast", 370)]
    assert "| 370 img/s (fast, batch 32) | met |" in said(rows, "train XL/2, bfloat16, one H200")


def test_what_is_slower_is_bold() -> None:
    op = {"bench": "kernels", "op": "ln_modulate", "mode": "fwd", "dtype": "bfloat16", "shape": {"B": 1}}
    rows = rows_of({"metric": "ms", "p50": 1.0}, {"metric": "ratio", "p50": 0.8}, provider="fast", **op)
    assert "| **0.80x (0.72-0.88), slower** |" in report.markdown(rows)
    rows = rows_of({"metric": "ms", "p50": 1.0}, {"metric": "ratio", "p50": 0.95}, provider="fast", **op)
    assert "slower" not in report.markdown(rows), "within the rounds' spread"


def test_pictures(tmp_path: Path) -> None:
    rows = models("fast", 300)
    op = {"bench": "kernels", "dtype": "bfloat16", "shape": {"B": 1}}
    for provider in ("fast", "eager"):
        rows += rows_of(
            {"metric": "gb_per_s", "p50": 2000.0}, {"metric": "tflop_per_s", "p50": 50.0},
            {"metric": "roof_share", "p50": 0.5}, op="linear", mode="fwd", provider=provider, **op,
        )  # fmt: skip
    rows += rows_of(
        {"op": "copy", "metric": "gb_per_s", "p50": 3000.0, "provider": "torch", "mode": "fwd"}, **op
    )
    rows += rows_of(
        {"op": "matmul", "metric": "tflop_per_s", "p50": 700.0, "provider": "torch", "mode": "fwd"}, **op
    )
    rows += attention("triton-packed", 1.0) + attention("triton-packed", 1.0, shape=SHAPE | {"d": 72})
    names = [path.name for path in report.pictures(rows, tmp_path / "plots")]
    assert names == ["throughput.png", "kernels.png", "roofline.png", "attention.png", "head-sizes.png"]
    assert all((tmp_path / "plots" / name).stat().st_size > 5000 for name in names)
    assert not roofline.draw(models("fast", 300), tmp_path / "none.png")
    assert not roofline.draw_head_sizes(attention("triton-packed", 1.0), tmp_path / "none.png")
    others = [row | {"device": "another GPU"} for row in rows]
    assert {path.name for path in report.pictures([*models("fast", 1), *others], tmp_path)} >= {
        "throughput-an-h200.png", "throughput-another-gpu.png", "roofline-another-gpu.png",
    }  # fmt: skip


def test_goals_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report.main(["--goals"]) == 0
    assert "| CPU, train S/2 over eager, float32 | ≥ 1.25x |" in capsys.readouterr().out
    assert report.main(["--goals", "--readme", str(tmp_path / "README.md")]) == 2
    assert "--readme: not with --goals" in capsys.readouterr().err


def test_a_goal_of_sampling_is_the_ancestral_samplers() -> None:
    rows, ddim = models("fast", 3.9, mode="sample"), models("fast", 5, mode="sample")
    rows += [row | {"switches": {"sampler": "ddim"}} for row in ddim]
    assert "| 3.9 img/s (fast, batch 32) | **missed** |" in said(rows, "sample XL/2, 250 steps, one H200")
