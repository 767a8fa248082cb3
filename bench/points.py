"""Points: one op at one shape, dtype and mode, timed for all its providers in interleaved rounds. Shared by
``kernels.py`` and ``attention.py``.

On a GPU every provider's call is replayed as one CUDA graph, so that kernels are timed rather than the speed
at which Python launches them. If a call cannot be captured, a note says so.
"""

import argparse
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from typing import Any, Literal

import torch
from rich.console import Console
from torch import Tensor

import command
import tables
from formats import number, one_line, sizes
from mdt_fast.cuda_graphs import Graphed
from mdt_fast.kernels.backends import tf32
from measure import (
    MIN_ROUNDS,
    Copy,
    Matmul,
    Spread,
    Timing,
    op_clock,
    rates,
    ratios,
    spread,
    synchronize,
    take_turns,
)
from providers import Skip
from replay import captured
from rows import RowFile

Mode = Literal["fwd", "fwd+bwd"]
MODES: tuple[Mode, ...] = ("fwd", "fwd+bwd")

WARM_UP = 3
BURSTS = 3  # matmul bursts timed after each roofline point that has FLOPs, besides the first one's probe
REPEATS = {"cpu": 20, "cuda": 50}

ROUND_SECONDS = 2.0  # granted to timing even if compiling has used up a point's share of the time
BUSY_LOAD = 0.7

TOLERANCE = {torch.float32: 2e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Largest relative error (of norms) of a provider that is still timed; loose enough for TF32's products."""
TF32_TOLERANCE = 5e-3  # of attention: Triton does not round operands, gradients are 2.2e-3 off (simulated)

Call = Callable[[], list[Tensor]]
"""One timed call. It returns outputs and gradients, for the comparison."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """``prepare(device)`` makes the arguments and returns, for each provider, a function that makes its
    :data:`Call` or raises ``Skip``. Speed is compared with ``base``, results with ``oracle`` (except those of
    ``unlike``, which compute something else). ``bytes`` is the least a call must move; with ``roofline``, it
    and ``flops`` are compared with the machine's rates. ``providers`` lists them if the op lacks some."""

    bench: str
    op: str
    mode: Mode
    shape: dict[str, int]
    dtype: torch.dtype
    prepare: Callable[[torch.device], dict[str, Callable[[], Call]]]
    base: str
    oracle: str
    bytes: int = 0
    flops: int = 0
    roofline: bool = False
    unlike: frozenset[str] = frozenset()
    providers: tuple[str, ...] | None = None
    switches: Mapping[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def title(self) -> str:
        return f"{self.op} · {sizes(self.shape)} · {self.dtype_name}"


@dataclass
class Result:
    """The results of one provider at one point; spreads are (p20, p50, p80)."""

    mode: Mode
    provider: str
    notes: list[str] = field(default_factory=list)
    ms: Spread | None = None
    gb_per_s: Spread | None = None
    tflop_per_s: Spread | None = None
    roof_share: Spread | None = None
    ratio: Spread | None = None


def call_of(mode: Mode, function: Callable[..., Any], arguments: Sequence[Any]) -> Call:
    """A call of ``function``. ``fwd`` runs without autograd; ``fwd+bwd`` also computes the gradients of all
    arguments that require them, from output gradients that are the same for every provider."""
    if mode == "fwd":
        inputs = [a.detach() if isinstance(a, Tensor) else a for a in arguments]

        def forward() -> list[Tensor]:
            with torch.no_grad():
                return outputs_of(function(*inputs))

        return forward
    leaves = [a for a in arguments if isinstance(a, Tensor) and a.requires_grad]
    gradients: list[Tensor] = []

    def both() -> list[Tensor]:
        outputs = outputs_of(function(*arguments))
        if not gradients:
            gradients.extend(map(made_up_gradient, outputs))
        return [*outputs, *torch.autograd.grad(outputs, leaves, gradients)]

    return both


def outputs_of(result: Any) -> list[Tensor]:
    return list(result) if isinstance(result, tuple) else [result]


def made_up_gradient(output: Tensor) -> Tensor:
    """A fixed random gradient in the memory layout of ``output``, as the following op would hand it back."""
    generator = torch.Generator(output.device).manual_seed(1)
    values = torch.randn(output.shape, generator=generator, device=output.device)
    return torch.empty_like(output).copy_(values)


def difference(got: Sequence[Tensor], want: Sequence[Tensor]) -> float:
    """The largest relative difference: the norm of each difference over the norm of the oracle's tensor."""
    pairs = [(g.detach().float(), w.detach().float()) for g, w in zip(got, want, strict=True)]
    return max(float((g - w).norm() / w.norm().clamp_min(1e-30)) for g, w in pairs)


def add_options(parser: argparse.ArgumentParser, providers: Sequence[str]) -> None:
    parser.add_argument("--mode", help="fwd, fwd+bwd or both, comma-separated (default: fwd,fwd+bwd)")
    parser.add_argument("--dtype", help="float32, float16, bfloat16 (default: float32; on a GPU bfloat16)")
    parser.add_argument("--providers", help=f"comma-separated, from {', '.join(providers)}")
    parser.add_argument("--repeats", type=int, help="interleaved rounds; each times every provider once")
    parser.add_argument(
        "--time-limit", type=float, metavar="SECONDS", help="start no new round after this time"
    )
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--device", help="auto, cpu, cuda or cuda:N (default: auto)")


class Request:
    """The checked options of :func:`add_options`."""

    def __init__(
        self,
        args: argparse.Namespace,
        providers: Sequence[str],
        *,
        time_limits: Mapping[str, float],
        not_on_cpu: Sequence[str] = (),
    ):
        self.started = time.monotonic()
        self.device = command.device(args.device or "auto")
        on_cpu = self.device.type == "cpu"
        if self.device.index is not None and not on_cpu:
            torch.cuda.set_device(self.device)  # where events are recorded
        self.modes = command.names("--mode", args.mode or ",".join(MODES), MODES)
        dtypes = command.names(
            "--dtype", args.dtype or ("float32" if on_cpu else "bfloat16"), tuple(command.DTYPES)
        )
        self.dtypes = [command.DTYPES[name] for name in dtypes]
        self.asked = args.providers is not None
        self.providers = [name for name in providers if not (on_cpu and name in not_on_cpu)]
        if self.asked:
            asked = command.names("--providers", args.providers, providers)
            self.providers = [name for name in providers if name in asked]
        command.at_least_one("--repeats", args.repeats)
        command.positive_seconds("--time-limit", args.time_limit)
        command.set_threads(args.threads)
        self.repeats = args.repeats or REPEATS[self.device.type]
        self.time_limit = args.time_limit or time_limits[self.device.type]


def measure(points: Sequence[Point], request: Request, rows: RowFile) -> bool:
    """Measure and print all points; True if any provider was measured. Consecutive points of one op, shape
    and dtype share a table."""
    console = Console(width=max(tables.WIDTH, Console().width))
    end = request.started + request.time_limit
    load = os.getloadavg()[0]
    if request.device.type == "cpu" and load > BUSY_LOAD:
        print(f"load average {load:.1f}: other work on this machine may show in the times")
    measured, done = False, 0
    told: set[tuple[str, str]] = set()
    with Console(stderr=True).status("starting") as status:
        session = Session(rows, request)
        for title, group in groupby(points, key=lambda point: point.title):
            results: list[Result] = []
            roofs: list[str] = []
            for point in group:
                status.update(f"{title} · {point.mode}")
                now = time.monotonic()
                results += session.run(point, now + (end - now) / (len(points) - done), end)
                roofs += [f"roof of {point.mode}: {session.roof}"] if session.roof else []
                done += 1
            tables.show_points(console, title, roofs, results, points[0].base, told)
            measured = measured or any(one.ms is not None for one in results)
    return measured


class Session:
    """What all the points of a run share."""

    def __init__(self, rows: RowFile, request: Request):
        self.rows, self.request, self.device = rows, request, request.device
        self.clock = op_clock(self.device)
        self.capture = partial(Graphed, device=self.device) if self.device.type == "cuda" else None
        self.matmuls: dict[torch.dtype, Matmul] = {}
        self.roof = ""

    def run(self, point: Point, deadline: float, end: float) -> list[Result]:
        """Measure the requested providers and write their rows. ``deadline`` is the end of the point's share
        of the time until ``end``; a point that starts after it is skipped."""
        names = [
            name for name in self.request.providers if point.providers is None or name in point.providers
        ]
        found = {name: Result(point.mode, name) for name in names}
        self.roof = ""
        if time.monotonic() >= deadline:
            for one in found.values():
                self.give_up(point, one, "skipped", "the time limit was reached before its turn")
            return list(found.values())
        torch._dynamo.reset()
        calls = self.agreeing(point, names, found, deadline)
        if calls:
            self.time(point, calls, found, max(deadline, min(end, time.monotonic() + ROUND_SECONDS)))
        del calls
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return list(found.values())

    def agreeing(
        self, point: Point, names: Sequence[str], found: dict[str, Result], deadline: float
    ) -> dict[str, Call]:
        """The calls of the providers that can run here and agree with the oracle."""
        torch.manual_seed(0)
        try:
            makers = point.prepare(self.device)
        except Exception as error:
            for one in found.values():
                self.give_up(point, one, "failed", one_line(error))
            return {}
        calls: dict[str, Call] = {}
        expected: list[Tensor] | None = None
        without = "it cannot run here"
        try:
            expected = makers[point.oracle]()()
        except Exception as error:
            without = one_line(error)
        for name in names:
            try:
                if name == "compile" and time.monotonic() >= deadline:
                    raise Skip("the time limit was reached before it was compiled")
                call = makers[name]()
                off = None
                if name == point.oracle or name in point.unlike:
                    call()
                elif expected is None:
                    call()
                    found[name].notes.append(f"not compared with {point.oracle}: {without}")
                else:
                    off = difference(call(), expected)
                synchronize(self.device)
            except Skip as reason:
                self.give_up(point, found[name], "skipped", str(reason))
                continue
            except Exception as error:
                self.give_up(point, found[name], "failed", one_line(error))
                continue
            in_tf32 = point.bench == "attention" and point.dtype == torch.float32 and tf32()
            limit = TF32_TOLERANCE if in_tf32 else TOLERANCE[point.dtype]
            if off is not None and not off <= limit:
                reason = f"disagrees with {point.oracle}: off by {off:.1e} relative, allowed {limit:.0e}"
                self.give_up(point, found[name], "failed", reason)
                continue
            calls[name] = call
        return calls

    def time(self, point: Point, calls: dict[str, Call], found: dict[str, Result], deadline: float) -> None:
        ready = {name: captured(call, self.capture, found[name].notes) for name, call in calls.items()}
        turns: dict[str, Callable[[int], object]] = {
            name: lambda index, call=call: call() for name, call in ready.items()
        }
        if point.roofline:
            turns["copy"] = Copy(self.device, point.bytes)
        warm = take_turns(turns, self.device, repeats=WARM_UP, clock=self.clock, deadline=deadline)
        alive = {name: turn for name, turn in turns.items() if warm[name].error is None}
        timings = take_turns(
            alive,
            self.device,
            repeats=self.request.repeats,
            clock=self.clock,
            deadline=deadline,
            shuffle=True,
        )
        for name in turns:
            error = warm[name].error or timings[name].error
            if name in found and error is not None:
                self.give_up(point, found[name], "failed", one_line(error))
        good = {name: timing for name, timing in timings.items() if timing.error is None}
        roof = self.roof_seconds(point, good["copy"].seconds) if "copy" in good else None
        for name in calls:
            if name in good:
                self.evaluate(point, good, roof, found[name])

    def roof_seconds(self, point: Point, copied: list[float]) -> list[float]:
        """The least time that the machine's rates allow, round by round: that of a copy of the same number of
        bytes in the same round or of the FLOPs at the run's best matmul rate, whichever is longer."""
        rate, flop_seconds = rates(point.bytes / 1e9, spread(copied)), 0.0
        self.roof = f"copy of {number(point.bytes / 1e6)} MB: {number(rate[1])} GB/s"
        self.rows.add(
            rate, bench=point.bench, op="copy", provider="torch", mode="fwd", shape={"bytes": point.bytes},
            dtype="uint8", metric="gb_per_s", unit="GB/s", switches={}, rounds=len(copied),
        )  # fmt: skip
        if point.flops:
            if point.dtype not in self.matmuls:
                self.matmuls[point.dtype] = Matmul(self.device, point.dtype)
            matmul = self.matmuls[point.dtype]
            bursts = take_turns({"matmul": matmul}, self.device, repeats=BURSTS)["matmul"]
            if bursts.error is not None:
                raise bursts.error
            matmul.see(bursts)
            flop_seconds, peak = point.flops / matmul.best, f"{matmul.best / 1e12:.4g}"
            self.roof += f"; matmul peak, the best of this run: {peak} TFLOP/s"
            self.rows.add(
                rates(matmul.flops / 1e12, spread(bursts.seconds)), bench=point.bench, op="matmul",
                provider="torch", mode="fwd", shape=[matmul.size] * 3, dtype=point.dtype_name,
                metric="tflop_per_s", unit="TFLOP/s", switches={}, rounds=BURSTS,
                note=f"best of the run: {peak}",
            )  # fmt: skip
        return [max(seconds, flop_seconds) for seconds in copied]

    def evaluate(
        self, point: Point, timings: dict[str, Timing], roof: list[float] | None, one: Result
    ) -> None:
        """Turn seconds into the table's columns and write their rows."""
        timing = timings[one.provider]
        seconds, rounds = timing.seconds, len(timing.seconds)
        one.ms = spread([1e3 * s for s in seconds])
        if timing.late:
            one.notes.append(f"{timing.late} of {rounds} calls may have been limited by their launches")
        note = "; ".join(one.notes) or None
        self.row(point, one, "ms", "ms", one.ms, rounds, note)
        if point.bytes:
            one.gb_per_s = rates(1e3 * point.bytes / 1e9, one.ms)
            self.row(point, one, "gb_per_s", "GB/s", one.gb_per_s, rounds)
        if point.flops:
            one.tflop_per_s = rates(1e3 * point.flops / 1e12, one.ms)
            self.row(point, one, "tflop_per_s", "TFLOP/s", one.tflop_per_s, rounds)
        if roof is not None and one.provider != "float8":  # float8 products have another peak
            one.roof_share = ratios(roof, seconds)
            self.row(point, one, "roof_share", "1", one.roof_share, rounds, f"of {self.roof}")
        if point.base not in timings:
            return
        if rounds < MIN_ROUNDS:
            reason = f"too few rounds ({rounds}; a ratio takes {MIN_ROUNDS})"
            one.notes.append(f"no ratio: {reason}")
            self.row(point, one, "ratio", "1", (None, None, None), rounds, reason)
            return
        one.ratio = ratios(timings[point.base].seconds, seconds)
        self.row(point, one, "ratio", "1", one.ratio, rounds, f"speed over {point.base}'s")

    def give_up(self, point: Point, one: Result, metric: str, reason: str) -> None:
        one.notes.append(f"{metric}: {reason}")
        self.row(point, one, metric, "", (None, None, None), None, reason)

    def row(
        self,
        point: Point,
        one: Result,
        metric: str,
        unit: str,
        values: tuple[float | None, float | None, float | None],
        rounds: int | None,
        note: str | None = None,
    ) -> None:
        said = {key: value for key, value in (("rounds", rounds), ("note", note)) if value is not None}
        switches = dict(point.switches.get(one.provider, {}))
        self.rows.add(
            values, bench=point.bench, op=point.op, provider=one.provider, mode=point.mode, shape=point.shape,
            dtype=point.dtype_name, metric=metric, unit=unit, switches=switches, **said,
        )  # fmt: skip
