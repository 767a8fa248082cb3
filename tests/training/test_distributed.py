"""Runs of several processes (gloo, CPU): the same numbers as one, faults that end all, and resuming."""

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import several_runs
from mdt_fast.cli import main
from mdt_fast.errors import UserError
from mdt_fast.kernels.native import library
from mdt_fast.processes import resolve_device
from mdt_fast.training.checkpoint import PARTS, latest, open_checkpoint
from mdt_fast.training.data import check_data
from mdt_fast.training.distributed import let_go
from mdt_fast.training.run import equal_share, prepare
from tiny import ARGUMENTS, tiny

pytestmark = pytest.mark.slow

OPTIONS = [
    "train", "--preset=digits", *ARGUMENTS, "--threads=1", "--device=cpu", "--batch-size=8", "--save-every=4",
    "--set=train.log_every=1", "--set=train.warmup_steps=0", "--set=sample.steps=2",
]  # fmt: skip


def torchrun(*program: str, restarts: int = 0) -> list[str]:
    return [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
        f"--max-restarts={restarts}", "--monitor-interval=0.1", *program,
    ]  # fmt: skip


def on_two(*runs: tuple[Path, list[str]]) -> subprocess.CompletedProcess[str]:
    """Trainings by two processes, all in one launch, since a launch takes longer than a training."""
    lines = json.dumps([[*OPTIONS, f"--out={run}", *options] for run, options in runs])
    return subprocess.run(
        torchrun(several_runs.__file__, lines),
        capture_output=True, text=True, env=environment(), timeout=300,
    )  # fmt: skip


def alone(run: Path, *options: str) -> None:
    """A training by one process: this one."""
    before = torch.get_num_threads()
    assert main([*OPTIONS, f"--out={run}", *options]) == 0
    torch.set_num_threads(before)


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", **more}


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def same_losses(run: Path, other: Path, tolerance: float = 1e-6) -> None:
    for row, expected in zip(rows(run), rows(other), strict=True):
        for key, value in expected.items():
            if key.startswith(("loss", "mse", "vb", "m_")):
                assert row[key] == pytest.approx(value, rel=tolerance, abs=tolerance), (row["step"], key)


CASES = {
    "mdtv2-adan": ["--set=train.optimizer=adan"],
    "mdt-accumulated": ["--accumulate=2", "--set=model.family=mdt", "--set=model.decode_layer=1"],
    "mdt-in-turn": ["--set=train.passes=in_turn", "--set=model.family=mdt", "--set=model.decode_layer=1"],
    "dit-hybrid": ["--set=model.family=dit", "--set=train.parallel=hybrid"],
    "mdtv2-ddp": ["--set=train.parallel=ddp", "--accumulate=2"],
}


MOMENTS = ("float32", "bfloat16") if library("cpu") else ("float32",)


@pytest.fixture(scope="module")
def eight_steps(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """By two processes: each case, an unbroken run, one of only four steps, and one whose pictures fail.

    Returns the folder of all, and what they printed.
    """
    root = tmp_path_factory.mktemp("eight")
    (root / "pictures").mkdir()
    (root / "pictures" / "samples").write_text("in the way")
    done = on_two(
        *((root / name / "two", ["--steps=8", *options]) for name, options in CASES.items()),
        *(
            (root / f"whole-{moments}", ["--steps=8", f"--set=train.moments={moments}"])
            for moments in MOMENTS
        ),
        *(
            (root / f"halves-{moments}", ["--steps=4", f"--set=train.moments={moments}"])
            for moments in MOMENTS
        ),
        (root / "pictures", ["--steps=8"]),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return root, done.stdout


@pytest.fixture(scope="module")
def carried_on(eight_steps: tuple[Path, str]) -> Path:
    """Each case by one process, too; all resumed by the other number of processes; the broken run resumed."""
    root, _ = eight_steps
    for name, options in CASES.items():
        single = [option for option in options if "accumulate" not in option and "in_turn" not in option]
        alone(root / name / "one", "--steps=8", *single)
        same_losses(root / name / "two", root / name / "one")
        alone(root / name / "two", "--resume=auto", "--steps=12", "--accumulate=1", *single)
    done = on_two(
        *((root / name / "one", ["--resume=auto", "--steps=12", *CASES[name]]) for name in CASES),
        *((root / f"halves-{moments}", ["--resume=auto", "--steps=8"]) for moments in MOMENTS),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return root


def test_one_process_prints(eight_steps: tuple[Path, str]) -> None:
    root, printed = eight_steps
    assert printed.count("8 steps done") == len(CASES) + len(MOMENTS) + 1
    assert printed.count("4 steps done") == len(MOMENTS)
    for name in CASES:
        assert (root / name / "two" / "samples.png").stat().st_size > 100


@pytest.mark.parametrize("case", CASES)
def test_two_processes_are_one(case: str, carried_on: Path) -> None:
    """Losses agree, also per quarter of the noise levels; then each goes on with the other process count."""
    assert len(rows(carried_on / case / "one")) == 12
    same_losses(carried_on / case / "two", carried_on / case / "one")


@pytest.mark.parametrize("moments", MOMENTS)
def test_resumed_on_two_processes_it_is_the_unbroken_run_bit_for_bit(moments: str, carried_on: Path) -> None:
    ours, theirs = (open_checkpoint(carried_on / f"{name}-{moments}") for name in ("halves", "whole"))
    assert ours.step == theirs.step == 8
    for part in PARTS:
        a, b = ours.tensors(part), theirs.tensors(part)
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)
    assert theirs.state["processes"] == 2


def test_pictures_that_cannot_be_made_do_not_end_the_run(eight_steps: tuple[Path, str]) -> None:
    root, printed = eight_steps
    assert "warning: no picture" in printed
    assert open_checkpoint(root / "pictures").step == 8


def started(run: Path, *options: str, restarts: int = 0) -> subprocess.Popen[str]:
    """A long run of two processes that has saved its first checkpoint."""
    command = ["-m", "mdt_fast", *OPTIONS, f"--out={run}", "--steps=100000", "--set=train.keep=2", *options]
    process = subprocess.Popen(
        torchrun(*command, restarts=restarts),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(),
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while latest(run) is None:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return process


def workers(process: subprocess.Popen[str]) -> list[int]:
    """The processes that torchrun started, by rank."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    ranks = {}
    for child in children:
        variables = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        for variable in variables:
            if variable.startswith(b"RANK="):
                ranks[int(variable[5:])] = int(child)
    return [ranks[rank] for rank in sorted(ranks)]


def test_sigterm_saves_and_ends_all_without_an_error(tmp_path: Path) -> None:
    """A cluster's pre-emption: every process gets the signal, at slightly different moments."""
    process = started(tmp_path)
    for worker in workers(process):
        os.kill(worker, signal.SIGTERM)
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
    (stopped,) = re.findall(r"stopped after (\d+) steps, checkpoint saved", stdout)
    assert open_checkpoint(tmp_path).step == int(stopped)
    open_checkpoint(tmp_path).verify()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_lost_process_ends_all_with_one_message(rank: int, tmp_path: Path) -> None:
    process = started(tmp_path)
    os.kill(workers(process)[rank], signal.SIGKILL)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode != 0
    errors = [line for line in stderr.splitlines() if line.startswith("mdt-fast: error:")]
    assert len(errors) <= 1, stderr  # none if torchrun ended the other before it noticed
    if errors:
        assert "another process of the run was lost" in errors[0]
        assert "the last checkpoint is" in errors[0]
    open_checkpoint(tmp_path).verify()
    reached = open_checkpoint(tmp_path).step + 4
    alone(tmp_path, "--resume=auto", f"--steps={reached}")
    assert open_checkpoint(tmp_path).step == reached


def test_torchrun_starts_a_lost_process_again(tmp_path: Path) -> None:
    process = started(tmp_path, "--resume=auto", restarts=1)
    lost = workers(process)
    os.kill(lost[1], signal.SIGKILL)
    deadline = time.monotonic() + 120
    before = open_checkpoint(tmp_path).step
    while open_checkpoint(tmp_path).step <= before + 8 or set(workers(process)) & set(lost):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    stdout, _ = process.communicate(timeout=120)
    assert "resuming from" in stdout
    steps = [row["step"] for row in rows(tmp_path)]
    assert steps == sorted(set(steps))


def test_every_process_has_an_equal_share_of_the_pictures() -> None:
    """With unequal shares some would gather weights alone, and wait for ever."""
    for count in (10, 20, 50, 100):
        labels = list(range(count))
        for size in range(1, 129):
            shares = [equal_share(labels, rank, size) for rank in range(size)]
            assert len({len(own) for _, own in shares}) == 1
            assert [label for _, own in shares for label in own][:count] == labels
            assert [first for first, _ in shares] == [rank * len(shares[0][1]) for rank in range(size)]


def test_a_mistake_is_said_once(tmp_path: Path) -> None:
    mistakes = {
        "--batch-size=7": "--batch-size: 7 is not divisible by 2 processes; the nearest that is: 8",
        "--set=train.compile=model": "train.compile: 'model' needs one process, or train.parallel ddp",
    }
    for option, message in mistakes.items():
        done = on_two((tmp_path / "run", [option]))
        assert done.returncode != 0
        errors = [line for line in done.stderr.splitlines() if line.startswith("mdt-fast: error:")]
        assert len(errors) == 1, done.stderr
        assert message in errors[0]
        assert not (tmp_path / "run").exists()


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="Linux alone tells which threads run")
@pytest.mark.parametrize(("name", "waited_for"), [("pt_gloo_runloop", True), ("another", False)])
def test_a_group_is_left_when_its_threads_hold_nothing(name: str, waited_for: bool) -> None:
    """A thread that dropped its tensors late used to abort a finished process as it exited."""
    started, enough, ended = threading.Event(), threading.Event(), threading.Event()

    def work() -> None:
        Path(f"/proc/self/task/{threading.get_native_id()}/comm").write_text(name)
        started.set()
        while not enough.is_set():
            hashlib.sha256(bytes(50_000_000))  # releases the interpreter's lock
        ended.set()

    thread = threading.Thread(target=work)
    thread.start()
    started.wait()
    let_go(patience=0.01 if waited_for else 100)
    assert not ended.is_set()
    threading.Timer(0.2, enough.set).start()
    if waited_for:
        let_go(patience=100)
        assert ended.is_set()
    thread.join()


def test_processes_need_the_same_images(tmp_path: Path) -> None:
    """Copies on each machine's own disk may differ, and would number classes and images differently."""
    run = prepare(tiny(), tmp_path / "run", None)
    world: Any = SimpleNamespace(size=2, rank=1, all_gather_object=lambda own: [own, own])
    check_data(run.config, run.images, run.first_stage, world)
    world.all_gather_object = lambda own: ["another's", own]
    with pytest.raises(UserError, match=r"data\.source: process 0 found other images than process 1"):
        check_data(run.config, run.images, run.first_stage, world)


def test_processes_that_do_not_know_their_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(UserError, match="LOCAL_RANK: not set, so processes cannot be assigned to GPUs"):
        resolve_device("cuda")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert resolve_device("cuda") == torch.device("cuda", 1)
