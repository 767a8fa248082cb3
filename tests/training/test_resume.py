"""A run that stopped, was killed or was resumed is bit for bit the unbroken one."""

import json
import random
import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

from forked import Forked
from mdt_fast.cli import main
from mdt_fast.errors import UserError
from mdt_fast.training import loop, passes, train
from mdt_fast.training.checkpoint import latest, locked, open_checkpoint
from tiny import ARGUMENTS, file_of, tensors_of, tiny

CLOCK = ("time", "img_per_s", "tflop_per_s", "memory_gib")


def rows(run: Path) -> list[dict]:
    """The metrics except what depends on the clock."""
    kept = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in CLOCK} for row in kept]


@pytest.mark.parametrize("optimizer", ["adan", "adamw"])
def test_two_halves_equal_the_whole(tmp_path: Path, optimizer: str) -> None:
    config = tiny(optimizer=optimizer)
    train(config, tmp_path / "whole")
    train(replace(config, train=replace(config.train, steps=4)), tmp_path / "halves")
    result = train(config, tmp_path / "halves", resume="auto")
    assert result.steps == 8
    whole, halves = (
        tensors_of(tmp_path / run / "checkpoints" / "step_0000008") for run in ("whole", "halves")
    )
    assert {name.split("/")[0] for name in whole} == {"model", "ema", "optimizer"}
    assert whole == halves
    assert rows(tmp_path / "whole") == rows(tmp_path / "halves")
    assert [row["step"] for row in rows(tmp_path / "whole")] == [3, 4, 6, 8]


def test_the_same_seed_gives_the_same_run_and_another_does_not(tmp_path: Path) -> None:
    for run, seed in (("a", 5), ("b", 5), ("c", 6)):
        train(tiny(steps=2, seed=seed), tmp_path / run)
    a, b, c = (tensors_of(tmp_path / run / "checkpoints" / "step_0000002") for run in "abc")
    assert a == b
    key = f"{file_of('model')}: final_layer.linear.weight"
    assert a[key] != c[key]


def test_back_to_an_earlier_checkpoint_keeps_the_later_ones_aside(tmp_path: Path) -> None:
    config, run = tiny(), tmp_path / "run"
    train(config, run)
    before, whole = rows(run), tensors_of(run / "checkpoints" / "step_0000008")
    train(config, run, resume=str(run / "checkpoints" / "step_0000004"))
    names = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert names == ["step_0000004", "step_0000008", "superseded_step_0000008"]
    assert tensors_of(run / "checkpoints" / "superseded_step_0000008") == whole
    assert tensors_of(run / "checkpoints" / "step_0000008") == whole
    assert rows(run) == before


def test_resuming_a_finished_run_changes_nothing(tmp_path: Path) -> None:
    train(tiny(), tmp_path / "run")
    before = rows(tmp_path / "run")
    assert train(tiny(), tmp_path / "run", resume="auto").steps == 8
    assert rows(tmp_path / "run") == before


def test_auto_starts_where_nothing_is_saved_yet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It says so if that is a run which has lost its checkpoints."""
    assert train(tiny(steps=2), tmp_path / "run", resume="auto").steps == 2
    assert "no checkpoint" not in capsys.readouterr().out
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    assert train(tiny(steps=1), tmp_path / "run", resume="auto").steps == 1
    assert "run': the run begins again, and its metrics do" in capsys.readouterr().out


def test_another_runs_checkpoint_starts_a_new_run_from_it(tmp_path: Path) -> None:
    train(tiny(steps=4), tmp_path / "a")
    train(tiny(), tmp_path / "b", resume=str(tmp_path / "a"))
    train(tiny(), tmp_path / "whole")
    checkpoint = Path("checkpoints", "step_0000008")
    assert tensors_of(tmp_path / "b" / checkpoint) == tensors_of(tmp_path / "whole" / checkpoint)


@pytest.mark.parametrize("resume", ["auto", "a"])
def test_such_a_run_killed_before_it_saved_begins_there_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resume: str
) -> None:
    """Not from random weights; and the checkpoint it began from is asked for."""
    monkeypatch.chdir(tmp_path)
    train(tiny(steps=4), "a")
    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_step", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            train(tiny(), "b", resume="a")
    assert latest(tmp_path / "b") is None
    train(tiny(), "b", resume=resume)
    train(tiny(), "whole")
    checkpoint = Path("checkpoints", "step_0000008")
    assert tensors_of(tmp_path / "b" / checkpoint) == tensors_of(tmp_path / "whole" / checkpoint)
    Path("a").rename("elsewhere")
    train(tiny(steps=9), "b", resume="auto")  # from its own, now
    shutil.rmtree("b/checkpoints")
    shutil.copytree("b", "anew")
    Path("anew", "metrics.jsonl").unlink()
    train(tiny(steps=1, save_every=9), "anew")
    assert not Path("anew", "began_from").exists()
    with pytest.raises(UserError, match=r"out: 'b' began from '.*step_0000004', which does not exist"):
        train(tiny(steps=9), "b", resume="auto")


def test_settings_that_decide_the_numbers_cannot_change(tmp_path: Path) -> None:
    train(tiny(steps=4), tmp_path / "run")
    with pytest.raises(UserError, match=r"train.weight_decay: cannot be changed.* has 0\.0, got 0\.5"):
        train(tiny(weight_decay=0.5), tmp_path / "run", resume="auto")
    assert latest(tmp_path / "run") == tmp_path / "run" / "checkpoints" / "step_0000004"


def test_a_run_is_not_overwritten(tmp_path: Path) -> None:
    train(tiny(steps=2), tmp_path / "run")
    before = tensors_of(tmp_path / "run" / "checkpoints" / "step_0000002")
    with pytest.raises(UserError, match="already holds a run; use --resume auto"):
        train(tiny(seed=1), tmp_path / "run")
    assert tensors_of(tmp_path / "run" / "checkpoints" / "step_0000002") == before


@pytest.mark.parametrize("inside", ["", "step_0000002", "new"])
def test_no_run_begins_among_the_checkpoints_of_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inside: str
) -> None:
    """The other one would take it for a checkpoint of its own, and delete it in time."""
    run = tmp_path / "run"
    train(tiny(steps=2), run)
    monkeypatch.chdir(run / "checkpoints")
    with pytest.raises(UserError, match=rf"^out: got '.*', expected a run's folder, such as '{run}'$"):
        train(tiny(steps=3), Path(inside), resume="auto")
    assert train(tiny(steps=3), run, resume="auto").steps == 3


def test_two_processes_cannot_train_in_one_folder(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    with locked(run), pytest.raises(UserError, match="another process is training"):
        train(tiny(), run)


def test_a_refused_start_leaves_nothing_and_prepares_under_the_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "a" / "run"
    with pytest.raises(UserError, match=r"train.lr_anneal|train.steps"):
        train(tiny(steps=0), run)
    assert list(tmp_path.iterdir()) == []
    prepare = loop.prepare

    def prepare_alone(*args):
        with pytest.raises(UserError, match="another process is training"), locked(run):
            pass
        return prepare(*args)

    monkeypatch.setattr(loop, "prepare", prepare_alone)
    assert train(tiny(steps=1), run).steps == 1


@pytest.fixture
def heard() -> Iterator[None]:
    """Signals act as usual: under nohup or in the background some are ignored, and stay so."""
    usual = {signal.SIGHUP: signal.SIG_DFL, signal.SIGINT: signal.default_int_handler}
    before = {number: signal.signal(number, action) for number, action in usual.items()}
    yield
    for number, action in before.items():
        signal.signal(number, action)


@pytest.mark.usefixtures("heard")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
def test_stopped_between_two_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    config = tiny(steps=12, log_every=6, save_every=12)
    train(config, tmp_path / "whole")
    with monkeypatch.context() as patch:
        step = loop.train_step

        def interrupted(run, *args) -> None:
            step(run, *args)
            if run.step == 8:
                signal.raise_signal(number)
                if number == signal.SIGHUP:
                    signal.raise_signal(number)  # a closing terminal sends it twice

        patch.setattr(loop, "train_step", interrupted)
        result = train(config, tmp_path / "halves")
    assert (result.steps, result.signal) == (8, number)
    assert [row["step"] for row in rows(tmp_path / "halves")] == [6]
    train(config, tmp_path / "halves", resume="auto")
    halves, whole = rows(tmp_path / "halves"), rows(tmp_path / "whole")
    assert [list(row.items()) for row in halves] == [list(row.items()) for row in whole]


@pytest.mark.usefixtures("heard")
def test_stopped_before_the_first_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """There is no curve to draw yet, which needs no warning."""
    step = loop.train_step
    monkeypatch.setattr(loop, "train_step", lambda *args: (step(*args), signal.raise_signal(signal.SIGINT)))
    assert train(tiny(), tmp_path / "run").steps == 1
    assert "warning" not in capsys.readouterr().out


def test_a_folder_deleted_while_training_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = loop.train_step
    monkeypatch.setattr(loop, "train_step", lambda *args: (step(*args), shutil.rmtree(tmp_path / "run")))
    with pytest.raises(UserError, match=r"metrics.jsonl: cannot be written: No such file"):
        train(tiny(log_every=1, tensorboard=False), tmp_path / "run")


def test_an_ignored_signal_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with loop.Interrupts() as interrupts:
            signal.raise_signal(signal.SIGHUP)
        assert interrupts.caught is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_odd_lines_in_the_metrics_are_left_out(tmp_path: Path) -> None:
    train(tiny(steps=4), tmp_path)
    before = rows(tmp_path)
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(b'\xff\xfe\n1\nnull\n[]\n{}\n{"step": "a"}\n{"step": true}\n' + b"[" * 100_000 + b"\n{")
    train(tiny(steps=6), tmp_path, resume="auto")
    after = rows(tmp_path)
    assert after[: len(before)] == before
    assert [row["step"] for row in after] == [3, 4, 6]


def spoilt(monkeypatch: pytest.MonkeyPatch, *bad: int) -> None:
    """Make the losses of these steps (counted from 1) NaN."""
    true_losses, calls = passes.losses_of, []

    def broken(*args):
        calls.append(1)
        terms = true_losses(*args)
        return {**terms, "loss": terms["loss"] * float("nan")} if len(calls) in bad else terms

    monkeypatch.setattr(passes, "losses_of", broken)


def test_half_pictures_of_a_killed_run_are_removed(tmp_path: Path) -> None:
    train(tiny(steps=4), tmp_path)
    (tmp_path / "samples").mkdir()
    for name in (".loss.png.0123abcd.partial", "samples/.step_0000004.png.89abcdef.partial"):
        (tmp_path / name).write_bytes(b"half")
    train(tiny(steps=6), tmp_path, resume="auto")
    assert not list(tmp_path.rglob("*.partial"))


def test_too_many_losses_that_are_not_finite_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    message = r"^loss is nan at step 6 \(train.max_skips=0\); the last checkpoint is .*step_0000004'$"
    with monkeypatch.context() as patch:
        spoilt(patch, 6)
        with pytest.raises(UserError, match=message):
            train(tiny(max_skips=0), tmp_path / "run")
    assert latest(tmp_path / "run") == tmp_path / "run" / "checkpoints" / "step_0000004"
    assert [row["step"] for row in rows(tmp_path / "run")] == [3, 4]

    spoilt(monkeypatch, 2, 4, 5, 6)
    with pytest.raises(UserError, match=r"^loss is nan at step 4, and so are the 2 steps after it"):
        train(tiny(max_skips=2), tmp_path / "more")


def test_the_checkpoint_before_the_bad_steps_is_kept_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One saved among them would fail again."""
    spoilt(monkeypatch, 8, 9, 10)
    saved = tmp_path / "run" / "checkpoints"
    message = r"the last checkpoint before that step is '.*step_0000004', from which to resume$"
    with pytest.raises(UserError, match=rf"^loss is nan at step 8, .*; {message}"):
        train(tiny(max_skips=2, steps=12, keep=1), tmp_path / "run")
    assert sorted(path.name for path in saved.iterdir()) == ["step_0000004", "step_0000008"]
    spoilt(monkeypatch, 1, 2, 3, 4, 5)
    with pytest.raises(
        UserError, match=r"^loss is nan at step 1, .*; no checkpoint is from before that step"
    ):
        train(tiny(max_skips=4), tmp_path / "other")


def test_a_step_that_is_not_finite_is_left_out_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoilt(monkeypatch, 2, 5, 6)
    train(tiny(log_every=1, max_skips=2), tmp_path / "run")
    found = {row["step"]: row for row in rows(tmp_path / "run")}
    assert [row.get("skipped") for row in found.values()] == [None, 1, 1, 1, 2, 3, 3, 3]
    assert "loss" not in found[2]
    assert found[3]["loss"] > 0
    saved = open_checkpoint(tmp_path / "run").tensors("optimizer", "counters/")
    assert saved == {"counters/skipped_steps": torch.tensor(3)}


def test_a_streak_of_bad_steps_goes_on_after_a_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        spoilt(patch, 3, 4)
        train(tiny(max_skips=3, steps=4), tmp_path)
    spoilt(monkeypatch, 1, 2)
    with pytest.raises(UserError, match=r"loss is nan at step 3, and so are the 3 steps after it"):
        train(tiny(max_skips=3), tmp_path, resume="auto")


@pytest.mark.slow
def test_ended_at_a_random_moment(tmp_path: Path) -> None:
    """By SIGTERM, then run to the end. (``tests/soak.py`` does the same with SIGKILL, again and again.)"""
    config, broken = tiny(steps=24, save_every=1, keep=2), tmp_path / "broken"
    train(config, tmp_path / "whole")
    command = ["train", "--preset=digits", *ARGUMENTS, "--steps=24", "--save-every=1", "--batch-size=4"]
    command += ["--device=cpu", "--set=train.log_every=3", "--set=train.keep=2", "--set=sample.steps=3"]
    command += ["--set=sample.num_samples=4", f"--out={broken}", "--resume=auto"]
    process = Forked(command, tmp_path / "out", tmp_path / "err")
    while latest(broken) is None and process.poll() is None:
        time.sleep(0.005)
    time.sleep(random.Random(3).random() * 0.1)
    process.send_signal(signal.SIGTERM)
    code, (printed, wrong) = process.wait(60), process.printed()
    assert code == 0, wrong
    assert "checkpoint saved" in printed or "24 steps done" in printed
    assert main(command) == 0
    final = Path("checkpoints", "step_0000024")
    assert tensors_of(broken / final) == tensors_of(tmp_path / "whole" / final)
    steps = [row["step"] for row in rows(broken)]
    assert steps == sorted(set(steps)) == [row["step"] for row in rows(tmp_path / "whole")]
