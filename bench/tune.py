"""Tune the launch choices of the Triton kernels on this machine's GPU; the winners are stored as data.

    python bench/tune.py --json rows.jsonl                   every kernel at every published shape class
    python bench/tune.py --json rows.jsonl --ops rel_attention --time-limit 400
    python bench/tune.py --json rows.jsonl --report --write  measures nothing; writes winners to tuned.json
    python bench/tune.py --compile-only --arch sm_90         needs no GPU; ranks choices by machine code

Choices are compiled first. One that spills, or needs more shared memory than there is, is not timed. The rest
are checked against the results of the current choice, then timed with it in interleaved rounds on an emptied
cache. Rows are saved as they are made and read back at the start, so that the same command resumes a stopped
run.

The ranking of ``--compile-only`` suggests an order in which to try choices; only a GPU can tell which is
faster.
"""

import argparse
import os
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch
from torch import Tensor

import aot
import candidates
import command
import points
from formats import one_line
from mdt_fast.cuda_graphs import Graphed
from mdt_fast.errors import UserError, nearest
from mdt_fast.kernels import launches
from mdt_fast.kernels.launches import Choice, Entry, forced
from measure import op_clock, ratios, release, spread, synchronize, take_turns
from promise import Outcome, outcome_of, promise, show, worst_of
from replay import captured
from rows import Row, RowFile, machine, read
from winners import conclude, key_of, source_of

ARCHITECTURES = tuple(aot.SHARED_BYTES)
AT_ONCE = 8
"""Choices timed together with the current one, in the same interleaved rounds."""
TIGHTEST = 2
"""Compilations that rank a choice before timing: those that use most registers under the current choice."""


def main(argv: Sequence[str] | None = None) -> int:
    """Tune. Returns 0; 1 if there are no rows; 2 after a user error; 130 after Ctrl-C."""
    argv = list(sys.argv[1:] if argv is None else argv)
    return command.guarded("tune", lambda kept: _main(argv, kept))


def _main(argv: list[str], kept: command.Kept) -> int:
    args = _parser().parse_args(argv)
    wanted = kernels_of(args.ops)
    kinds = command.names("--dtype", args.dtype, ("half", "float32", "tf32"))
    batch, top = command.whole("--batch", args.batch), command.whole("--top", args.top)
    command.at_least_one("--repeats", args.repeats)
    command.positive_seconds("--time-limit", args.time_limit)
    if args.report and args.json is None:
        raise UserError("--report: needs --json FILE, the rows of earlier runs")
    if args.report and not args.json.exists():
        raise UserError(f"--json: no file {str(args.json)!r}; --report reads the rows of earlier runs")
    if args.compile_only and (args.write or args.report):
        raise UserError(
            f"--{'write' if args.write else 'report'}: not with --compile-only, which times nothing"
        )
    timing = not (args.compile_only or args.report)
    if args.arch is not None and timing:
        raise UserError("--arch: only with --compile-only; timing uses the device of this machine")
    arch = args.arch or "sm_90"
    if arch not in ARCHITECTURES:
        raise UserError(
            f"--arch: unknown {arch!r}{nearest(arch, ARCHITECTURES)}; known: {', '.join(ARCHITECTURES)}"
        )
    if timing and not torch.cuda.is_available():
        raise UserError(
            "no CUDA device here (or no CUDA build of torch): nothing can be timed; "
            "--compile-only ranks by machine code"
        )
    device = torch.device("cuda" if timing else "cpu")
    arch = launches.architecture(device.index) if timing else arch
    known = [] if args.json is None or not args.json.exists() else read([args.json])
    if args.report:
        conclude(known, wanted, args.write)
        return 0
    kept.rows = rows = RowFile(args.json, machine(device, shlex.join(["python", "bench/tune.py", *argv])))
    sizes = None if args.sizes is None else args.sizes.split(",")
    todo = [
        (kernel, shape)
        for kernel, shape in candidates.entries(arch)
        if kernel in wanted
        and shape.split()[1] in kinds
        and (sizes is None or shape in sizes or shape.split()[0] in sizes)
    ]
    if sizes is not None and not todo:
        raise UserError(f"--sizes: {args.sizes!r} names no shape class of {', '.join(wanted)}")
    end = time.monotonic() + (args.time_limit or float("inf"))
    with ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn")) as pool:
        bench = Tuner(rows, known, arch, device, pool, end, batch=batch, top=top, repeats=args.repeats)
        for place, entry in enumerate(todo):
            if time.monotonic() >= end:
                print(f"the time limit was reached; {len(todo) - place} of {len(todo)} left: run it again")
                break
            with candidates.products(entry):
                bench.compile_only(entry) if args.compile_only else bench.tune(entry)
    if not args.compile_only:
        conclude([*known, *rows.rows], wanted, args.write)
    command.conclude(rows, None, lambda rows, path: False)
    return 0 if rows.rows or known else 1


def kernels_of(text: str | None) -> list[str]:
    """The kernels named in ``text``, each by its own name or by that of its room or op."""
    if text is None:
        return list(candidates.KERNELS)
    named: dict[str, list[str]] = {}
    for kernel, tunable in candidates.KERNELS.items():
        for name in {kernel, tunable.op, tunable.room}:
            named.setdefault(name, []).append(kernel)
    asked = command.names("--ops", text, tuple(named))
    return list(dict.fromkeys(kernel for name in asked for kernel in named[name]))


@dataclass
class Tuner:
    """What all the entries of a run share."""

    rows: RowFile
    known: Sequence[Row]
    arch: str
    device: torch.device
    pool: ProcessPoolExecutor
    end: float
    batch: int = 32
    top: int = 24
    repeats: int = 30
    compiled: dict[str, Outcome] = field(default_factory=dict)

    def compile_only(self, entry: Entry) -> None:
        """Print a table of an entry's choices and write their rows."""
        choices = [*candidates.KERNELS[entry[0]].choices()]
        judged = self.judge(entry, choices)
        for choice, outcome in judged:
            self.row(entry, "", choice, outcome, "registers" if isinstance(outcome, dict) else "skipped")
        show(entry, self.arch, judged, self.top)

    def tune(self, entry: Entry) -> None:
        """Time those choices of an entry that have no rows yet."""
        makers = candidates.calls(entry, self.batch, self.device)
        if not makers:
            print(f"{' '.join(entry)}: no published model has this shape")
            return
        done = self.done(entry)
        good: list[tuple[Choice, dict[str, float]]] = []
        for choice, outcome in self.judge(entry, [*candidates.KERNELS[entry[0]].choices()]):
            if isinstance(outcome, str):
                if choice and ("", key_of(choice)) not in done:
                    self.row(entry, "", choice, outcome, "skipped")
            elif choice and len(good) < self.top:
                good.append((choice, outcome))
        timed = 0
        for title, make in makers.items():
            waiting = [one for one in good if (title, key_of(one[0])) not in done]
            for first in range(0, len(waiting), AT_ONCE):
                if time.monotonic() >= self.end:
                    return
                some = waiting[first : first + AT_ONCE]
                self.time(entry, title, make, dict(enumerate(some)))
                timed += len(some)
        print(f"{' '.join(entry)} on {self.arch}: {timed} timings, {len(good)} choices, {len(makers)} points")

    def done(self, entry: Entry) -> set[tuple[str, str]]:
        """The (point, choice) pairs that already have a row from the current code on this device."""
        source, device = source_of(entry[0]), self.rows.common["device"]
        return {
            (row["point"], key_of(row["switches"]))
            for row in self.known
            if row["bench"] == "tune" and (row["op"], row["shape"], row["arch"]) == (*entry, self.arch)
            and row["source"] == source and row["device"] == device and row["metric"] != "registers"
        }  # fmt: skip

    def judge(self, entry: Entry, choices: Sequence[Choice]) -> list[tuple[Choice, Outcome]]:
        """Pair each choice with the outcome of its tightest compilations, most promising first. Choices that
        spill or do not fit come last, with that as their outcome."""
        now = candidates.cases(entry, self.arch, {})
        said = self.compile([(entry, {}, i) for i in range(len(now))])
        registers = [-1.0 if isinstance(one, str) else one["registers"] for one in said]
        judges = sorted(range(len(now)), key=lambda i: -registers[i])[:TIGHTEST]
        outcomes = self.compile([(entry, choice, i) for choice in choices for i in judges])
        n = len(judges)
        worst = [worst_of(outcomes[i * n : (i + 1) * n]) for i in range(len(choices))]
        return sorted(zip(choices, worst), key=lambda one: promise(one[1]))

    def compile(self, jobs: Sequence[tuple[Entry, Choice, int]]) -> list[Outcome]:
        """The outcomes of ``jobs``, in order. Identical compilations are done once."""
        keys, new = [], {}
        for entry, choice, i in jobs:
            case = candidates.cases(entry, self.arch, choice)[i]
            key = repr((entry, case.label, sorted(case.constants.items()), case.num_warps, case.num_stages))
            keys.append(key)
            if key not in self.compiled:
                new[key] = (entry, dict(choice), i, self.arch)
        self.compiled.update(zip(new, self.pool.map(outcome_of, new.values(), chunksize=2)))
        return [self.compiled[key] for key in keys]

    def time(
        self,
        entry: Entry,
        title: str,
        make: Callable[[], points.Call],
        some: dict[int, tuple[Choice, dict[str, float]]],
    ) -> None:
        """Time some choices in interleaved rounds with the current one and write a row for each."""
        release(self.device)
        torch.manual_seed(0)
        call = make()
        expected = call()
        # float8 results have no limit of their own: their float32 scales are among the results.
        limit = max(points.TOLERANCE.get(tensor.dtype, 0.0) for tensor in expected)
        if entry[1].endswith("tf32"):  # as precise as float16
            limit = max(limit, points.TOLERANCE[torch.float16])

        def turn(choice: Choice | None) -> Callable[[int], Sequence[Tensor]]:
            def one(index: int) -> Sequence[Tensor]:
                if choice is None:
                    return call()
                with forced(entry, choice):
                    return call()

            return one

        turns = {"present": turn(None)}
        for i, (choice, _) in some.items():
            try:
                off = points.difference(turn(choice)(0), expected)
                synchronize(self.device)
                if not off <= limit:
                    raise ValueError(f"disagrees with the current choice: off by {off:.1e} relative")
            except Exception as error:
                self.failed(entry, title, choice, error)
                continue
            turns[str(i)] = turn(choice)
        # Replay graphs, as ``points.py`` does: separate launches would be timed at the host's speed.
        capture = partial(Graphed, device=self.device) if self.device.type == "cuda" else None
        notes: list[str] = []
        replays = {name: captured(partial(one, 0), capture, notes) for name, one in turns.items()}
        if notes:  # never compare graph replays with separate launches
            replays = {name: partial(one, 0) for name, one in turns.items()}
        turns = {name: lambda index, replay=replay: replay() for name, replay in replays.items()}
        clock = op_clock(self.device)
        take_turns(turns, self.device, repeats=points.WARM_UP, clock=clock)
        timings = take_turns(turns, self.device, repeats=self.repeats, clock=clock, shuffle=True)
        present = timings.pop("present")
        if present.error is not None:
            raise present.error
        for name, timing in timings.items():
            choice, outcome = some[int(name)]
            if timing.error is not None:
                self.failed(entry, title, choice, timing.error)
                continue
            ratio = ratios(present.seconds, timing.seconds)
            ms = [1e3 * spread(seconds)[1] for seconds in (timing.seconds, present.seconds)]
            self.row(entry, title, choice, outcome, "ratio", ratio, ms=ms[0], present_ms=ms[1],
                     rounds=len(timing.seconds), late=timing.late + present.late)  # fmt: skip

    def failed(self, entry: Entry, title: str, choice: Choice, error: Exception) -> None:
        """Write a row for the failure. Raises ``UserError`` if the device is unusable after it, so that no
        other choice is blamed."""
        self.row(entry, title, choice, one_line(error), "failed")
        try:
            synchronize(self.device)
        except Exception as lost:
            raise UserError(
                f"{' '.join(entry)}: {dict(choice)} left the device unusable ({one_line(lost)}); "
                "run it again: this choice will be left out"
            ) from None

    def row(
        self,
        entry: Entry,
        title: str,
        choice: Choice,
        outcome: Outcome,
        metric: str,
        values: Sequence[float | None] = (None, None, None),
        **more: float,
    ) -> None:
        said = {"note": outcome} if isinstance(outcome, str) else outcome
        if metric == "registers" and isinstance(outcome, dict):
            values = (None, outcome["registers"], None)
        self.rows.add(
            values, bench="tune", op=entry[0], shape=entry[1], point=title, arch=self.arch, provider="triton",
            mode=candidates.KERNELS[entry[0]].mode, dtype=entry[1].split()[1], metric=metric,
            unit="" if isinstance(outcome, str) else "1", switches=dict(choice), source=source_of(entry[0]),
            **more, **said,
        )  # fmt: skip


def _parser() -> argparse.ArgumentParser:
    parser = command.Parser(prog="tune", description="Tune the launch choices of the Triton kernels.")
    parser.add_argument("--ops", help="kernels, ops or rooms, comma-separated (default: all)")
    parser.add_argument(
        "--dtype", default="half", help="comma-separated, from half, float32, tf32 (default: half)"
    )
    parser.add_argument("--sizes", help="shape classes or their numbers, comma-separated (default: all)")
    parser.add_argument("--batch", default="32", help="batch size (default: 32)")
    parser.add_argument("--top", default="24", help="choices to time (or show) for each entry (default: 24)")
    parser.add_argument("--repeats", type=int, default=30, help="interleaved rounds (default: 30)")
    parser.add_argument(
        "--time-limit", type=float, metavar="SECONDS", help="start nothing new after this time"
    )
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count(), help="parallel compilations (default: number of CPUs)"
    )
    parser.add_argument("--compile-only", action="store_true", help="rank by machine code; needs no GPU")
    parser.add_argument(
        "--arch", help=f"with --compile-only: one of {', '.join(ARCHITECTURES)} (default: sm_90)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="row file, read first and appended to")
    parser.add_argument("--report", action="store_true", help="measure nothing; print the winners in --json")
    parser.add_argument("--write", action="store_true", help="write the winners to kernels/tuned.json")
    return parser


if __name__ == "__main__":
    sys.exit(main())
