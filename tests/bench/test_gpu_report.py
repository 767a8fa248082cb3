"""``gpu_report.sh``'s control flow, with a stand-in for python that records what it is asked to do."""

import argparse
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

import ahead
import attention
import convergence
import kernels
import report
import request
import sanitize
import training
import tune
from providers import NAMES, model_config

SCRIPT = Path(__file__).resolve().parents[2] / "bench" / "gpu_report.sh"
STAGES = [
    "build", "tests", "sanitize", "races", "kernels", "attention", "flex", "small", "middle", "large", "tf32",
    "host", "compiled", "compiled4", "whole", "float8", "precisions", "official", "account", "training",
    "breakdown", "switches", "sampling", "sampling_compiled", "tune", "learning", "report",
]  # fmt: skip
PARTS = [f"survey_{part}" for part in ("ahead", "large", "128", "small", "sample", "compiled", "switches")]
STAND_IN = """#!/bin/sh
{ printf '%s\\037' "$@"; echo; } >> "$RECORD"
case "$*" in *"${FAILS:-nothing}"*) exit 3 ;; *"${HANGS:-nothing}"*) exec sleep 60 ;; esac
"""
PARSERS: dict[str, Callable[[], argparse.ArgumentParser]] = {
    "ahead": ahead._parser, "attention": attention._parser, "convergence": convergence._parser,
    "kernels": kernels._parser, "report": report._parser, "sanitize": sanitize._parser,
    "throughput": request.parser, "training": training._parser, "tune": tune._parser,
}  # fmt: skip


@pytest.fixture
def start(tmp_path: Path) -> Callable[..., tuple[subprocess.CompletedProcess[str], list[list[str]]]]:
    python = tmp_path / "python"
    python.write_text(STAND_IN)
    python.chmod(0o755)
    record = tmp_path / "record"

    def run(*stages: str, **more: str) -> tuple[subprocess.CompletedProcess[str], list[list[str]]]:
        record.write_text("")
        environment = os.environ | {
            "PYTHON": str(python), "RECORD": str(record), "OUT": str(tmp_path / "out"), **more
        }  # fmt: skip
        done = subprocess.run(["bash", SCRIPT, *stages], capture_output=True, text=True, env=environment)
        asked = [line.split("\037")[:-1] for line in record.read_text().splitlines()]
        return done, [line for line in asked if line[:1] != ["-c"]]

    return run


def test_all_stages(start: Callable, tmp_path: Path) -> None:
    """All run; each line's script accepts it, with names that exist."""
    done, asked = start("first", "survey", *STAGES, OFFICIAL="a checkout")
    assert done.returncode == 0, done.stdout + done.stderr
    summary = done.stdout.partition("== summary")[2].splitlines()[1:]
    assert [line.split()[0] for line in summary] == ["first", "survey", *STAGES]
    assert all(line.endswith("passed") for line in summary)
    assert [
        line.split()[0] for line in start()[0].stdout.partition("== summary")[2].splitlines()[1:]
    ] == STAGES
    survey = [line[1:] for line in start("survey")[1]]
    assert [line[line.index("--batch") + 1] for line in survey if "--apart" in line] == ["128"]
    assert [line[1:] for line in start(*PARTS)[1]] == survey != []
    seen, models = set(), set()
    for line in asked:
        if line[0] == "-m":
            assert line[1] in ("pip", "pytest")
            continue
        path = Path(line[0])
        assert (SCRIPT.parents[1] / path).exists()
        args = PARSERS[path.stem]().parse_args(line[1:])
        seen.add(path.stem)
        assert getattr(args, "time_limit", None) is None or args.time_limit <= 420
        if path.stem in ("ahead", "throughput"):
            models |= {name for name in args.model.split(",") if model_config(name)}
            assert getattr(args, "account", False) or set(args.providers.split(",")) <= set(NAMES)
        if path.stem == "attention":
            assert set(args.providers.split(",")) <= set(attention.PROVIDERS)
    assert seen == set(PARSERS)
    assert models == {"MDTv2_S_2", "MDTv2_B_2", "MDTv2_L_2", "MDTv2_XL_2", "DiT_XL_2", "narrow"}
    assert "a checkout" in next(line for line in asked if "--official" in line)
    assert (tmp_path / "out" / "kernels_xl.log").exists()


def test_a_stage_that_fails_does_not_stop_the_others(start: Callable) -> None:
    done, asked = start("kernels", "small", "official", FAILS="bench/kernels.py")
    assert done.returncode == 1
    assert [line[0] for line in asked] == ["bench/kernels.py", "bench/kernels.py", "bench/throughput.py"]
    kernels_line, small, official = done.stdout.splitlines()[-3:]
    assert "FAILED (exit code 3)" in kernels_line
    assert small.endswith("passed")
    assert official.endswith("skipped")


def test_a_stage_ends_in_its_time(start: Callable) -> None:
    done, asked = start("training", "small", HANGS="bench/training.py", LIMIT="1")
    assert done.returncode == 1
    assert len([line for line in asked if line[0] == "bench/training.py"]) == 1, (
        "no time was left for the second"
    )
    assert "out of time: what it measured is kept, run it again" in done.stdout.splitlines()[-2]
    assert done.stdout.splitlines()[-1].endswith("passed")


def test_a_failure_is_told_though_time_ran_out_after_it(start: Callable, tmp_path: Path) -> None:
    """And a stage's log holds what all of its commands printed."""
    script = tmp_path / "python"
    script.write_text(script.read_text() + 'echo "$*"\n')
    options = {"FAILS": "--batch 128", "HANGS": "--providers reference", "LIMIT": "6"}
    done, _ = start("breakdown", **options)
    assert "FAILED (exit code 3)" in done.stdout.splitlines()[-1]
    for _ in range(2):  # a second run starts a new log
        start("breakdown")
        log = (tmp_path / "out" / "breakdown.log").read_text().splitlines()
        assert [line.split("--mode ")[1].split()[0] for line in log] == ["train", "train", "train", "sample"]


def test_what_cannot_run(start: Callable) -> None:
    done, asked = start("kernels", "kernel")
    assert (done.returncode, asked) == (2, [])
    assert "unknown stage kernel; known: first survey survey_ahead" in done.stderr
    done, asked = start("kernels", FAILS="cuda.is_available")
    assert (done.returncode, asked) == (2, [])
    assert "no CUDA device" in done.stderr
    done, asked = start("kernels", FAILS="-c import torch")
    assert (done.returncode, asked) == (2, [])
    assert "python (PYTHON) cannot import torch" in done.stderr
    assert start("kernels small")[0].returncode == 2
    done, asked = start("report", FAILS="cuda.is_available")  # needs no GPU
    assert (done.returncode, len(asked)) == (0, 2)
    assert "bash bench/gpu_report.sh [STAGE...]" in start("--help")[0].stdout


@pytest.mark.parametrize("limit", ["x", "0", "-5", "1.5", "8m"])
def test_a_limit_that_is_no_time(start: Callable, limit: str) -> None:
    done, asked = start("report", LIMIT=limit)
    assert (done.returncode, asked) == (2, [])
    assert done.stderr == f"gpu_report: LIMIT: got '{limit}', expected whole seconds, 1 or more\n"
