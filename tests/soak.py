"""Kills a real training with SIGKILL at random moments and compares what is left with an unbroken run.

    python tests/soak.py                        20 kills of one process on scikit-learn's digits
    python tests/soak.py --kills 5 --seed 3
    python tests/soak.py --processes 2          torchrun: at random one process is killed, or all at once
    python tests/soak.py --data DIR             images, or what mdt-fast encode made of them

A checkpoint is saved every step, asynchronously, so most kills land in the middle of something. Each resume
must continue from the newest checkpoint. At the end every tensor of the last checkpoint must be the same bit
for bit, and so must every row of the metrics, except for clock readings. Exit code 0 if all holds, else 1.
"""

import argparse
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forked import Forked
from mdt_fast.training.checkpoint import PARTIAL, PARTS, STATE, latest, open_checkpoint, steps
from tiny import ARGUMENTS

CLOCK = ("time", "img_per_s", "tflop_per_s", "peak_share", "memory_gib")
MOMENTS = ("start", "step", "save", "rename", "prune", "picture")
STEPS_PER_KILL = 5  # how far a resumed run gets at most before it is killed
LOST = "another process of the run was lost", "cannot join the others"  # what the surviving process may say
PATIENCE = 180  # seconds


class SoakError(Exception):
    """Something that should not have happened."""


Process = subprocess.Popen[bytes] | Forked


@dataclass
class Soak:
    """The runs of a soak: ``command`` trains ``steps`` steps; the run's folder is appended to it."""

    command: list[str]
    steps: int
    processes: int
    warm: bool
    rng: random.Random
    startup: float = 5.0  # seconds until the first new checkpoint

    def unbroken(self, run: Path) -> Process:
        return self._start(run, Path(f"{run}.log"))

    def broken(self, run: Path, kills: int) -> None:
        """Kill and resume, printing a line for each kill."""
        kinds = [MOMENTS[number % len(MOMENTS)] for number in range(kills)]
        self.rng.shuffle(kinds)
        for number, kind in enumerate(kinds, 1):
            before, log = step_of(latest(run)), Path(f"{run}.{number}.log")
            process = self._start(run, log)
            try:
                reached = self._await(kind, run, process)
                victims = self._kill(process)
            finally:
                end(process)
            check(run, before, log)
            note = "" if reached else f"; {kind} did not come"
            print(
                f"kill {number:2} of {kills}, at {kind + ':':8} {victims}; {scene(run)}; "
                f"complete up to step {step_of(latest(run))}, {before} before{note}",
                flush=True,
            )
        log = Path(f"{run}.last.log")
        before = step_of(latest(run))
        finish(self._start(run, log), log)
        check(run, before, log)

    def _start(self, run: Path, log: Path) -> Process:
        if self.warm:
            return Forked([*self.command, f"--out={run}"], log, log)
        several = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={self.processes}"]
        launcher = [*several, "--max-restarts=0", "--monitor-interval=0.1"] if self.processes > 1 else []
        line = [sys.executable, *launcher, "-m", "mdt_fast", *self.command, f"--out={run}"]
        with open(log, "wb") as file:
            return subprocess.Popen(line, stdout=file, stderr=subprocess.STDOUT)

    def _await(self, kind: str, run: Path, process: Process) -> bool:
        """Wait for a moment of this kind; False if it did not come in time."""
        folder, began = run / "checkpoints", time.monotonic()
        first = step_of(latest(run))
        if kind == "start":
            return wait(lambda: False, process, self.rng.random() * self.startup) or True
        if kind == "picture":  # the first comes with the first checkpoint
            pictures = lambda: any(name.endswith(".png") for name in unfinished(run))  # noqa: E731
            return wait(lambda: pictures() or step_of(latest(run)) > first + 2, process) and pictures()
        if not wait(lambda: step_of(latest(run)) > first, process):
            raise SoakError("no checkpoint was written")
        self.startup = time.monotonic() - began
        ahead = self.rng.randrange(STEPS_PER_KILL - 2)  # how many more checkpoints to wait for
        wait(lambda: step_of(latest(run)) > first + ahead, process)
        newest, there = step_of(latest(run)), set(names(folder))
        come: dict[str, tuple[Callable[[], bool], float]] = {
            "step": (lambda: True, 0.2),
            "save": (lambda: any(number > newest for number in partial(folder)), 0.1),
            "rename": (lambda: step_of(latest(run)) > newest, 0.002),
            "prune": (lambda: any(number <= newest for number in partial(folder))
                      or bool(there - set(names(folder))), 0.001),
        }  # fmt: skip
        event, spread = come[kind]
        done = step_of(latest(run)) + STEPS_PER_KILL - ahead - 2
        found = wait(lambda: event() or step_of(latest(run)) >= done, process) and event()
        time.sleep(self.rng.random() * spread)
        return found

    def _kill(self, process: Process) -> str:
        """Send SIGKILL; returns a description of what it hit."""
        if process.poll() is not None:
            raise SoakError("the run ended before it was killed")
        children = workers(process)
        if children and self.rng.random() < 0.5:
            rank = self.rng.choice(sorted(children))
            os.kill(children[rank], signal.SIGKILL)
            process.wait(PATIENCE)
            return f"process {rank} of {self.processes}"
        process.kill()
        for child in children.values():
            os.kill(child, signal.SIGKILL)
        return f"all {self.processes}" if self.processes > 1 else "killed"


def wait(event: Callable[[], bool], process: Process, seconds: float = PATIENCE) -> bool:
    """Wait for ``event``, the end of the process or the time limit; returns whether the event came."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.poll() is None:
        if event():
            return True
        time.sleep(0.0002)
    return event()


def workers(process: Process) -> dict[int, int]:
    """The processes that torchrun has started, by rank."""
    ranks = {}
    try:
        for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
            found = re.search(rb"(?:^|\0)RANK=(\d+)\0", Path(f"/proc/{child}/environ").read_bytes())
            if found:
                ranks[int(found[1])] = int(child)
    except OSError:  # gone by now
        pass
    return ranks


def end(process: Process) -> None:
    """Kill the process and its workers, and wait until none can write any more."""
    children = workers(process) if process.poll() is None else {}
    process.kill()
    for child in children.values():
        os.kill(child, signal.SIGKILL)
    process.wait()
    while any(Path(f"/proc/{child}").exists() for child in children.values()):
        time.sleep(0.01)


def finish(process: Process, log: Path) -> None:
    try:
        if process.wait(PATIENCE * 10) != 0:
            raise SoakError(f"a run failed:\n{log.read_text(errors='replace')[-2000:]}")
    finally:
        end(process)


def check(run: Path, before: int, log: Path) -> None:
    """The run continued from the newest checkpoint, and every checkpoint is intact."""
    for checkpoint in steps(run):
        open_checkpoint(checkpoint).verify()
    if step_of(latest(run)) < before:
        raise SoakError(f"there was a checkpoint of step {before}, which is lost")
    text = log.read_text(errors="replace")
    found = re.search(r"step_0*(\d+) \(\d+ steps done\)", text)
    if found and int(found[1]) != before:
        raise SoakError(f"it went on from step {found[1]}, the newest was {before}")
    for line in text.splitlines():
        if line.startswith("mdt-fast: error:") and not any(words in line for words in LOST):
            raise SoakError(line)


def step_of(checkpoint: Path | None) -> int:
    return int(checkpoint.name.removeprefix("step_")) if checkpoint else 0


def names(folder: Path) -> list[str]:
    return os.listdir(folder) if folder.is_dir() else []


def partial(folder: Path) -> list[int]:
    """Checkpoints being written or removed."""
    prefix = f"{PARTIAL}step_"
    return [int(name.removeprefix(prefix)) for name in names(folder) if name.startswith(prefix)]


def unfinished(run: Path) -> list[str]:
    """Files that are still being written, other than checkpoints."""
    found = [name for folder in (run, run / "samples") for name in names(folder) if name.endswith(".partial")]
    return [name.removesuffix(".partial").strip(".").rpartition(".")[0] for name in found]


def scene(run: Path) -> str:
    """What was going on, judged by what is left in the folder."""
    folder, newest, seen = run / "checkpoints", step_of(latest(run)), []
    for number in partial(folder):
        inside = names(folder / f"{PARTIAL}step_{number:07d}")
        written = "all but its name" if STATE in inside else ", ".join(sorted(inside)) or "nothing yet"
        seen.append(f"writing step {number} ({written})" if number > newest else f"removing step {number}")
    seen += [f"writing {name}" for name in unfinished(run)]
    return " and ".join(seen) or "no file half-way"


def rows(run: Path) -> list[dict[str, Any]]:
    """The metrics without what depends on the clock."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in CLOCK} for line in lines]


def tensors(checkpoint: Path) -> dict[str, tuple[Any, ...]]:
    """Dtype, shape and bytes of every whole tensor; which process writes shared ones is left to chance."""
    opened = open_checkpoint(checkpoint)
    return {
        f"{part}/{name}": (tensor.dtype, tensor.shape, tensor.numpy().tobytes())
        for part in PARTS
        for name, tensor in opened.tensors(part).items()
    }


def compare(broken: Path, whole: Path) -> list[str]:
    """The differences, one line each."""
    wrong = []
    for run in (broken, whole):
        if left := unfinished(run) + [name for name in names(run / "checkpoints") if name[0] == "."]:
            wrong.append(f"{run.name}: left behind: {', '.join(left)}")
    ours, theirs = (sorted(names(run / "checkpoints")) for run in (broken, whole))
    if ours != theirs:
        return [*wrong, f"the checkpoints are {', '.join(ours)}, not {', '.join(theirs)}"]
    final = [tensors(run / "checkpoints" / ours[-1]) for run in (broken, whole)]
    wrong += [
        f"{name} differs" for name in {*final[0], *final[1]} if final[0].get(name) != final[1].get(name)
    ]
    a, b = rows(broken), rows(whole)
    if [row["step"] for row in a] != [row["step"] for row in b]:
        return [*wrong, f"there are {len(a)} rows of metrics, not {len(b)}, or of other steps"]
    return wrong + [
        f"row of step {x['step']} differs" for x, y in zip(a, b) if list(x.items()) != list(y.items())
    ]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="soak", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1, choices=(1, 2))
    parser.add_argument("--warm", action="store_true", help="begin at imports that are done: quicker")
    parser.add_argument("--data", default="digits", metavar="DIR", help="digits, or a folder")
    args = parser.parse_args(argv)
    if args.kills < 1:
        parser.error(f"--kills: must be at least 1, got {args.kills}")
    if args.warm and args.processes > 1:
        parser.error("--warm: for one process; torchrun starts its own")
    os.environ["OMP_NUM_THREADS"] = "1"
    length = STEPS_PER_KILL * args.kills + 5
    data = (
        ["--preset=digits", *ARGUMENTS]
        if args.data == "digits"
        else ["--preset=images", f"--data={args.data}"]
    )
    command = [
        "train", *data, "--resume=auto", "--threads=1", "--device=cpu", f"--steps={length}", "--batch-size=4",
        "--save-every=1", "--set=train.log_every=3", "--set=train.keep=2", "--set=sample.steps=2",
    ]  # fmt: skip
    startup = 0.5 if args.warm else 5.0
    soak = Soak(command, length, args.processes, args.warm, random.Random(args.seed), startup)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="soak-") as name:
        whole, broken = Path(name, "whole"), Path(name, "broken")
        beside = soak.unbroken(whole)
        try:
            soak.broken(broken, args.kills)
            finish(beside, Path(f"{whole}.log"))
            wrong = compare(broken, whole)
            count, lines = len(tensors(broken / "checkpoints" / f"step_{length:07d}")), len(rows(broken))
        except (SoakError, TimeoutError, subprocess.TimeoutExpired) as error:
            print(f"FAILED: {error}")
            return 1
        finally:
            end(beside)
    for line in wrong:
        print(line)
    minutes = (time.monotonic() - began) / 60
    print(
        f"{'FAILED' if wrong else 'the same bit for bit'}: {length} steps, {args.kills} kills, "
        f"{count} tensors, {lines} rows of metrics; {minutes:.1f} min"
    )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
