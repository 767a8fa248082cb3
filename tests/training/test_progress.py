"""What the screen shows: at several widths, without colours, without a terminal, and without a reader."""

import io
import os
import pty
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from mdt_fast.config import DataConfig
from mdt_fast.data.progress import clock
from mdt_fast.processes import Interrupts
from mdt_fast.training import progress
from mdt_fast.training.loop import Pictures, all_unreadable
from mdt_fast.training.progress import Rate, TrainingProgress, describe_loss, describe_speed, summary
from mdt_fast.training.sinks import Sinks

ROW: dict[str, Any] = {
    "step": 10, "loss": 0.1234, "m_loss": 0.2345, "lr": 3e-4, "img_per_s": 5123.4, "tflop_per_s": 412.3,
    "share_of_peak": 0.417, "memory_gib": 71.23, "skipped": 2,
}  # fmt: skip
BARE: dict[str, Any] = {"step": 10, "loss": 0.5, "lr": 1e-3, "img_per_s": 81.23}  # a CPU, no masks


def terminal(width: int, **options: Any) -> Console:
    return Console(file=io.StringIO(), width=width, force_terminal=True, highlight=False, **options)


def text_of(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def status(width: int, row: dict[str, Any] | None, step: int = 123_456, last: int = 400_000) -> list[str]:
    """The lines of the live display at half a second per step, five minutes after the start."""
    shown = progress._Status(0, last)
    shown.began = time.monotonic() - 300
    for back in range(20, -1, -1):
        shown.add(step - back, 1000 - back * 0.5)
    shown.row = row or {}
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    console.print(shown)
    return text_of(console).splitlines()


def test_a_wide_terminal_has_one_line() -> None:
    (line,) = status(200, ROW)
    assert len(line) == 200
    assert line.startswith("━")
    assert line.endswith(
        "  123456/400000  5:00 < 1d 14:24  loss 0.1234 (masked 0.2345)  5123 img/s  "
        "412 TFLOP/s (42% of peak)  71.2 GiB  lr 0.0003"
    )


def test_eighty_columns_have_two_lines_with_everything() -> None:
    first, second = status(80, ROW)
    assert len(first) == 80
    assert first.endswith("  123456/400000  5:00 < 1d 14:24")
    assert second.rstrip() == (
        "loss 0.1234 (masked 0.2345)  5123 img/s  412 TFLOP/s (42%)  71.2 GiB  lr 0.0003"
    )


@pytest.mark.parametrize("width", [20, 33, 40, 50, 60, 79, 100, 130, 150, 200])
@pytest.mark.parametrize("row", [None, BARE, ROW], ids=["before", "bare", "full"])
def test_no_line_is_wider_than_the_terminal(width: int, row: dict[str, Any] | None) -> None:
    lines = status(width, row)
    assert 1 <= len(lines) <= 2
    assert all(len(line) <= width for line in lines)


def test_a_narrow_terminal_keeps_what_matters_most() -> None:
    assert status(44, ROW)[1].split("  ")[:2] == ["loss 0.1234 (masked 0.2345)", "5123 img/s"]


def test_the_live_display_comes_and_goes() -> None:
    console = terminal(100)
    with TrainingProgress(0, 20, console) as bar:
        bar.say("[red]said[/red] above")
        bar.update(10, ROW)
    shown = text_of(console)
    assert "[red]said[/red] above" in shown
    assert "10/20" in shown
    assert "\x1b[?25l" in shown
    assert shown.rstrip().endswith("\x1b[?25h")  # the cursor is back


def test_no_color() -> None:
    console = terminal(100, no_color=True)
    with TrainingProgress(0, 20, console) as bar:
        bar.update(10, ROW)
    shown = text_of(console)
    assert "loss 0.1234" in shown
    assert "\x1b[3" not in shown
    assert "\x1b[9" not in shown


def plain(width: int = 80) -> Console:
    return Console(file=io.StringIO(), width=width, soft_wrap=True, highlight=False)


def test_plain_lines_are_complete_and_few() -> None:
    console = plain()
    with TrainingProgress(0, 1000, console) as bar:
        for step in range(1, 1001):
            bar.update(step, ROW if step % 5 == 0 else None)
    lines = text_of(console).splitlines()
    assert 15 <= len(lines) <= 25
    assert lines[0].startswith("step 5/1000  ")
    assert lines[-1] == (
        "step 1000/1000  loss 0.1234 (masked 0.2345)  5123 img/s  412 TFLOP/s (42% of peak)  71.2 GiB  "
        "0:00 left"
    )


def test_a_long_run_has_a_line_every_ten_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    console, now = plain(), [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with TrainingProgress(0, 400_000, console) as bar:
        for step in range(100, 10_001, 100):  # one a minute
            now[0] += 60
            bar.update(step, ROW)
    lines = text_of(console).splitlines()
    assert len(lines) == 10
    assert lines[1].startswith("step 1100/400000  ")
    assert lines[1].endswith("2d 18:29 left")


def test_a_resumed_run_counts_from_where_it_began() -> None:
    console = plain()
    with TrainingProgress(500, 520, console) as bar:
        bar.update(501, BARE)
    assert text_of(console).startswith("step 501/520  loss 0.5000  81 img/s  ")


def test_a_dumb_terminal_gets_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    console = terminal(80)
    with TrainingProgress(0, 20, console) as bar:
        bar.update(20, BARE)
    assert text_of(console) == "step 20/20  loss 0.5000  81 img/s  0:00 left\n"


def test_other_ranks_say_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    console = terminal(80)
    with TrainingProgress(0, 20, console, quiet=True) as bar:
        bar.say("hello")
        bar.update(20, ROW)
    assert text_of(console) == ""
    assert capsys.readouterr() == ("", "")
    assert bar.peak_memory_gib == ROW["memory_gib"]
    console.print("the console is still its owner's")
    assert text_of(console)


DEMO = """
from mdt_fast.training.progress import TrainingProgress
with TrainingProgress(0, 3000) as bar:
    for step in range(1, 3001):
        bar.update(step, {"loss": 0.5, "img_per_s": 9.0} if step % 10 == 0 else None)
        bar.say("x" * 100)
open("done", "w").write("yes")
"""


def test_a_closed_pipe_does_not_end_the_training(tmp_path: Path) -> None:
    done = subprocess.run(
        f"{sys.executable} -c '{DEMO}' 2>errors | head -n 1",
        shell=True, capture_output=True, text=True, cwd=tmp_path, timeout=60,
    )  # fmt: skip
    assert len(done.stdout.splitlines()) == 1
    assert (tmp_path / "done").read_text() == "yes"
    assert "Traceback" not in (tmp_path / "errors").read_text()


def test_a_closed_terminal_does_not_end_the_training(tmp_path: Path) -> None:
    """The other end closes in the middle: writing to the terminal then fails with EIO."""
    controller, own = pty.openpty()
    running = subprocess.Popen(
        [sys.executable, "-c", DEMO], stdout=own, stderr=subprocess.PIPE, text=True, cwd=tmp_path,
        env={**os.environ, "TERM": "xterm"},
    )  # fmt: skip
    os.close(own)
    try:
        assert os.read(controller, 100)
    finally:
        os.close(controller)
        _, errors = running.communicate(timeout=60)
    assert running.returncode == 0
    assert (tmp_path / "done").read_text() == "yes"
    assert "Traceback" not in errors


def test_time_left_forgets_a_slow_beginning() -> None:
    rate, now = Rate(), 0.0
    rate.add(0, now)
    assert rate.seconds_per_step() is None
    for step in range(1, 41):
        now += 60.0 if step <= 3 else 0.5  # the first three steps compile
        rate.add(step, now)
    assert rate.seconds_per_step() == pytest.approx(0.5)


def test_time_left_follows_a_change_of_speed() -> None:
    rate = Rate()
    for step in range(3001):
        rate.add(step, step * 0.1)
    for step in range(3001, 3601):
        rate.add(step, 300 + (step - 3000) * 0.2)
    assert rate.seconds_per_step() == pytest.approx(0.2)


def test_a_rate_where_a_run_goes_back_or_stands() -> None:
    rate = Rate()
    for step, now in ((10, 0.0), (11, 1.0), (5, 10.0), (5, 11.0), (6, 12.0)):
        rate.add(step, now)
    assert rate.seconds_per_step() == pytest.approx(2.0)


def test_descriptions() -> None:
    assert describe_loss(BARE) == "loss 0.5000"
    assert describe_loss(ROW) == "loss 0.1234 (masked 0.2345)"
    assert describe_loss({}) == "no finite loss"
    assert describe_speed(BARE) == "81 img/s"
    assert describe_speed(ROW) == "5123 img/s  412 TFLOP/s (42% of peak)  71.2 GiB"
    assert describe_speed({"img_per_s": 0.0, "tflop_per_s": 0.01234}) == "0 img/s  12.3 GFLOP/s"
    assert describe_speed({"img_per_s": 1.2345}) == "1.23 img/s"
    assert describe_speed({}) == ""


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00"), (59.6, "1:00"), (3723, "1:02:03"), (86_399.4, "23:59:59"), (90_061, "1d 01:01")],
)
def test_clock(seconds: float, text: str) -> None:
    assert clock(seconds) == text


def test_summary_of_a_run() -> None:
    lines = summary(
        ROW, 1000, 100.0, batch_size=256, num_images=512_000, world_size=8, peak_memory_gib=72.0,
        files=("runs/x/metrics.jsonl", "runs/x/checkpoints/"),
    )  # fmt: skip
    assert lines == [
        "steps          1,000",
        "images seen    256,000 (0.5 epochs)",
        "time           1:40",
        "mean speed     2560 img/s  206 TFLOP/s (21% of peak) in each process, "
        "including start, saving and pictures",
        "peak memory    72.0 GiB",
        "final loss     0.1234 (masked 0.2345)",
        "skipped steps  2",
        "files          runs/x/metrics.jsonl",
        "               runs/x/checkpoints/",
    ]


def test_summary_of_a_resumed_run_on_a_cpu() -> None:
    assert summary(BARE, 30, 10.0, batch_size=8, first=20, num_images=120) == [
        "steps        30 (10 since resuming)",
        "images seen  240 (2 epochs)",
        "time         0:10",
        "mean speed   8 img/s, including start, saving and pictures",
        "final loss   0.5000",
    ]


def test_summary_of_nothing() -> None:
    assert summary({}, 7, 0.0, batch_size=8, first=7) == [
        "steps        7 (0 since resuming)",
        "images seen  56",
        "time         0:00",
    ]


@pytest.mark.parametrize("processes", [1, 2])
def test_a_picture_without_memory(processes: int) -> None:
    """A single process leaves it out; of several, the others would wait in the middle of theirs."""

    def full() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    said: list[str] = []
    world = SimpleNamespace(size=processes, settle=lambda: None)
    run, bar = SimpleNamespace(world=world), SimpleNamespace(say=said.append)
    pictures = Pictures(bar, run, Sinks([], said.append), Interrupts())
    if processes == 1:
        pictures.draw(full)
        assert said == ["warning: no picture: not enough GPU memory"]
    else:
        with pytest.raises(torch.OutOfMemoryError):
            pictures.draw(full)


def test_images_that_any_process_left_out_are_told() -> None:
    """Each once, by its number."""
    world = SimpleNamespace(all_gather_object=lambda own: [own, {7: "seven, too"}, {}, {2: "two"}])
    data = DataConfig(source="digits", on_unreadable="skip")
    loader = SimpleNamespace(unreadable={7: "seven"})
    run: Any = SimpleNamespace(config=SimpleNamespace(data=data), loader=loader, world=world)
    assert all_unreadable(run) == {7: "seven, too", 2: "two"}
