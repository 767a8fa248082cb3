"""Run one case: build the providers, compare them, warm up, time interleaved rounds, measure peak memory."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from formats import one_line
from inputs import PERIOD, Inputs, len_keeps
from mdt_fast.kernels.backends import tf32
from mdt_fast.models import flops
from measure import (
    MIN_ROUNDS,
    Interrupted,
    Matmul,
    Spread,
    Timing,
    let_go,
    peak_bytes,
    rates,
    ratios,
    release,
    spread,
    take_turns,
)
from providers import Modules, Provider, Skip, make
from rows import RowFile
from steps import SAMPLING_STEPS, Case, Step, TrainStep, disagreement, step_of

WARM_UP = 2
"""Warm-up steps: the first creates the optimiser state, the second keeps another number of tokens."""

MAX_INNER_SECONDS = 0.1

TURN_SECONDS = 0.05
"""On a GPU a quick step is repeated for this long, or the time of the slowest step if that is less. Alone it
would be synchronised at both ends and charged for host work that overlaps the previous step in training."""

LEAST_SECONDS = 5.0
"""A case whose rounds are short gets as many as a ratio needs, even past the time limit: if several cases
share the limit, building the first one's models may have used up its part."""


@dataclass
class Result:
    """The results of one provider in one case; spreads are (p20, p50, p80)."""

    provider: str
    notes: list[str] = field(default_factory=list)
    compile_s: float | None = None
    img_per_s: Spread | None = None
    ms: Spread | None = None
    tflop_per_s: Spread | None = None
    peak_share: float | None = None
    peak_bytes: int | None = None
    ratio: Spread | None = None
    executed: float | None = None


@dataclass
class CaseResult:
    case: Case
    results: list[Result]
    repeats: int = 0
    steps: dict[str, int] = field(default_factory=dict)
    """The number of steps in each provider's part of a round."""
    gflop_per_image: float = 0.0
    peak: float = 0.0
    matmul_size: int = 0


def repeated(seconds: Mapping[str, float], inner: int) -> dict[str, int]:
    """How often each step, which takes ``seconds``, is called in a row, for each of ``inner`` indices."""
    turn = min(TURN_SECONDS / inner, max(seconds.values()))
    return {name: max(1, min(20, int(turn / one))) for name, one in seconds.items()}


class Session:
    """What all the cases of a run share."""

    def __init__(
        self, rows: RowFile, say: Callable[[str], None], probe: Matmul | None = None, lengths: int = PERIOD
    ):
        self.rows, self.say, self.lengths = rows, say, lengths
        self.matmuls = {} if probe is None else {probe.dtype: probe}

    def run(
        self,
        case: Case,
        names: Sequence[str],
        modules: Modules,
        inputs: Inputs,
        *,
        repeats: int,
        inner: int | None,
        deadline: float,
        skipped: dict[str, str],
    ) -> CaseResult:
        """Measure the providers ``names`` and write their rows. ``skipped`` has those left out, and why."""
        torch._dynamo.reset()
        release(case.device)
        found = {name: Result(name) for name in (*names, *skipped)}
        for name, reason in skipped.items():
            self.give_up(case, found[name], "skipped", reason)
        steps = self.agreeing(case, names, modules, inputs, found, deadline)
        result = CaseResult(case, list(found.values()))
        if not steps:
            return result
        if case.dtype not in self.matmuls:
            self.matmuls[case.dtype] = Matmul(case.device, case.dtype)
        matmul = self.matmuls[case.dtype]
        result.matmul_size = matmul.size

        self.say(f"{case.title}: warming up")
        seconds = self.warm_up(case, steps, found)
        if not steps:
            return result
        slowest, again = max(seconds.values()), dict.fromkeys(steps, 1)
        turns: dict[str, Callable[[int], object]] = {**steps, "matmul": matmul}
        if inner is None:
            inner = 1
            if case.device.type == "cuda":
                inner = max(1, min(20, int(MAX_INNER_SECONDS / slowest)))
                again = repeated(seconds, inner)
        result.steps = {name: inner * again[name] for name in steps}
        self.say(f"{case.title}: timing {', '.join(steps)}")
        # Memory is measured after the timing, and takes about two rounds.
        least = MIN_ROUNDS if MIN_ROUNDS * inner * slowest * len(turns) <= LEAST_SECONDS else 1
        try:
            timings = take_turns(
                turns, case.device, repeats=repeats, inner=inner, least=least, again=again,
                deadline=deadline - 2 * slowest * len(steps),
            )  # fmt: skip
        except Interrupted as interrupted:
            if all(one.seconds or one.error is not None for one in interrupted.timings.values()):
                self.timed(case, steps, interrupted.timings, matmul, inner, result, found)
            raise
        self.timed(case, steps, timings, matmul, inner, result, found)
        self.say(f"{case.title}: measuring memory")
        for name, step in steps.items():
            if found[name].ms is not None:
                self.memory(case, step, found[name])
                step.forget()  # gradients would keep a graph alive with all its memory
        return result

    def timed(
        self,
        case: Case,
        steps: dict[str, Step],
        timings: dict[str, Timing],
        matmul: Matmul,
        inner: int,
        result: CaseResult,
        found: dict[str, Result],
    ) -> None:
        """Write the rows of a case's rounds."""
        if timings["matmul"].error is None:
            matmul.see(timings["matmul"])
        result.peak = matmul.best / 1e12
        bursts = timings["matmul"].seconds
        self.rows.add(
            rates(matmul.flops / 1e12, spread(bursts)) if bursts else (None, result.peak, None),
            bench="throughput",
            op="matmul",
            provider="torch",
            mode="fwd",
            shape=[matmul.size] * 3,
            dtype=case.dtype_name,
            metric="tflop_per_s",
            unit="TFLOP/s",
            switches={},
            rounds=len(bursts),
            note=f"best of the run: {result.peak:.4g}",
        )
        for name, step in steps.items():
            if timings[name].error is not None:
                self.give_up(case, found[name], "failed", one_line(timings[name].error))
                step.forget()
                continue
            result.repeats = len(timings[name].seconds)
            self.evaluate(case, step, timings, inner, result, found[name])

    def agreeing(
        self,
        case: Case,
        names: Sequence[str],
        modules: Modules,
        inputs: Inputs,
        found: dict[str, Result],
        deadline: float,
    ) -> dict[str, Step]:
        """The steps of the providers that can run here and agree with the reference."""
        steps: dict[str, Step] = {}
        try:
            reference = self.step(case, make("reference", modules), inputs, steps)
            expected = reference.outcome()
            reference.forget()
        except Exception as error:
            let_go(error)
            for name in names:
                self.give_up(case, found[name], "failed", f"no reference to compare with: {one_line(error)}")
            return steps
        for name in names:
            if name == "reference":
                steps[name] = reference
                continue
            if name.endswith("-compiled") and time.monotonic() > deadline:
                self.give_up(
                    case, found[name], "skipped", "the time limit was reached before it was compiled"
                )
                continue
            start = time.perf_counter()
            try:
                provider = make(name, modules)
                if provider.compiled:
                    self.say(f"{case.title}: compiling {name}")
                step = self.step(case, provider, inputs, steps)
                try:
                    difference, problem = disagreement(step, expected)
                finally:
                    step.forget()
            except Skip as reason:
                self.give_up(case, found[name], "skipped", str(reason))
                continue
            except Exception as error:
                let_go(error)
                self.give_up(case, found[name], "failed", one_line(error))
                continue
            if provider.compiled:
                found[name].compile_s = time.perf_counter() - start
            if problem is not None:
                self.give_up(case, found[name], "failed", problem)
                continue
            self.row(case, name, "difference", "1", (None, difference, None))
            steps[name] = step
        return steps

    def step(self, case: Case, provider: Provider, inputs: Inputs, others: dict[str, Step]) -> Step:
        share = next((s for s in others.values() if s.provider.module is provider.module), None)
        return step_of(case, provider, inputs, len_keeps(case.config, self.lengths), share)

    def warm_up(self, case: Case, steps: dict[str, Step], found: dict[str, Result]) -> dict[str, float]:
        """Run every step a few times and remove those that fail. Returns the seconds of each one's last."""
        seconds: dict[str, float] = {}
        for name in list(steps):
            start = time.perf_counter()
            # The first step with a new number of kept tokens may compile kernels or capture a graph.
            repeats = WARM_UP
            if case.device.type == "cuda" and steps[name].provider.implementation == "fast":
                repeats = max(WARM_UP, self.lengths)
            timing = take_turns({name: steps[name]}, case.device, repeats=repeats)[name]
            if timing.error is not None:
                self.give_up(case, found[name], "failed", one_line(timing.error))
                steps.pop(name).forget()
                continue
            if found[name].compile_s is not None:
                found[name].compile_s += time.perf_counter() - start - repeats * timing.seconds[-1]
                self.row(case, name, "compile_s", "s", (None, found[name].compile_s, None))
            seconds[name] = timing.seconds[-1]
        return seconds

    def evaluate(
        self,
        case: Case,
        step: Step,
        timings: dict[str, Timing],
        inner: int,
        result: CaseResult,
        one: Result,
    ) -> None:
        """Turn seconds into the table's columns and write their rows."""
        name = one.provider
        timing = timings[name]
        useful = [self.useful_flops(case, step, i, inner) for i in timing.indices]
        images = case.batch if case.mode == "train" else case.batch / SAMPLING_STEPS
        flops_per_step = sum(useful) / len(useful)
        one.ms = spread([1e3 * s for s in timing.seconds])
        one.img_per_s = rates(1e3 * images, one.ms)
        one.tflop_per_s = rates(1e3 * flops_per_step / 1e12, one.ms)
        result.gflop_per_image = flops_per_step / case.batch / 1e9
        if "float8" not in name:  # float8 products have another peak
            one.peak_share = one.tflop_per_s[1] / result.peak
        note = f"extrapolated to {SAMPLING_STEPS} steps" if case.mode == "sample" else None
        of = f"of {result.peak:.4g} TFLOP/s"
        rounds = len(timing.seconds)
        steps = f"{result.steps[name]} steps a turn" if result.steps[name] > 1 else None
        self.row(case, name, "ms", "ms/step", one.ms, steps, rounds)
        self.row(case, name, "img_per_s", "img/s", one.img_per_s, note, rounds)
        self.row(case, name, "tflop_per_s", "TFLOP/s", one.tflop_per_s, rounds=rounds)
        if one.peak_share is not None:
            self.row(case, name, "peak_share", "1", (None, one.peak_share, None), of, rounds)
        if "reference" in timings and timings["reference"].error is None:
            self.ratio(case, one, timings["reference"], timing)
        self.executed(case, step, one, result.gflop_per_image)

    def ratio(self, case: Case, one: Result, reference: Timing, timing: Timing) -> None:
        rounds = len(timing.seconds)
        if rounds < MIN_ROUNDS:
            reason = f"too few rounds ({rounds}; a ratio takes {MIN_ROUNDS})"
            one.notes.append(f"no ratio: {reason}")
            self.row(case, one.provider, "ratio", "1", (None, None, None), reason, rounds)
            return
        one.ratio = ratios(reference.seconds, timing.seconds)
        self.row(case, one.provider, "ratio", "1", one.ratio, rounds=rounds)

    def useful_flops(self, case: Case, step: Step, index: int, inner: int) -> float:
        """Mean FLOPs per step that the reference needs, over ``inner`` steps from ``index`` on."""
        if not isinstance(step, TrainStep):
            return float(flops.sample_step(case.config).flops * case.batch)
        lengths = [step.len_keeps[i % len(step.len_keeps)] for i in range(index, index + inner)]
        return case.batch * sum(flops.train_step(case.config, length).flops for length in lengths) / inner

    def executed(self, case: Case, step: Step, one: Result, useful_gflop: float) -> None:
        """Write the FLOPs that the provider executes as a share of the useful ones, where countable."""
        made_by = step.provider.implementation
        if made_by in ("official", "diffusers"):
            return
        if case.turned and made_by == "fast" and not isinstance(step, TrainStep):
            one.notes.append("executed FLOPs unknown: only counted for a guided step with default switches")
            return
        try:
            if isinstance(step, TrainStep):
                length = step.len_keeps[0]
                unpacked = replace(case.switches, packed=False) if made_by == "fast" else None
                own = flops.train_step(case.config, length, made_by, case.batch, unpacked)
                share = own.flops / flops.train_step(case.config, length).flops / case.batch
            else:
                own = flops.sample_step(case.config, made_by)
                share = own.flops / flops.sample_step(case.config).flops
        except Exception as error:
            one.notes.append(f"executed FLOPs unknown: {one_line(error)}")
            return
        if own.uncounted:
            one.notes.append(f"executed FLOPs unknown: no formula for {', '.join(own.uncounted)}")
            return
        one.executed = share
        self.row(case, one.provider, "executed_flop_share", "1", (None, share, None))

    def memory(self, case: Case, step: Step, one: Result) -> None:
        try:
            step.forget()
            one.peak_bytes = step.own_bytes() + peak_bytes(step, case.device)
        except Exception as error:
            one.notes.append(f"peak memory unknown: {one_line(error)}")
            return
        self.row(case, one.provider, "peak_bytes", "B", (None, one.peak_bytes, None))

    def give_up(self, case: Case, one: Result, metric: str, reason: str) -> None:
        one.notes.append(f"{metric}: {reason}")
        self.row(case, one.provider, metric, "", (None, None, None), reason)

    def row(
        self,
        case: Case,
        provider: str,
        metric: str,
        unit: str,
        values: tuple[float | None, float | None, float | None],
        note: str | None = None,
        rounds: int | None = None,
    ) -> None:
        switches = {
            "compile": provider.endswith("-compiled"),
            "autocast": case.dtype == torch.bfloat16,
            "tf32": case.device.type == "cuda" and tf32(),
        }
        if case.mode == "sample":
            switches["sampler"] = case.sampler
        said = {key: value for key, value in (("rounds", rounds), ("note", note)) if value is not None}
        self.rows.add(
            values, bench="throughput", model=case.model, provider=case.label(provider), mode=case.mode,
            batch=case.batch, dtype=case.dtype_name, metric=metric, unit=unit, switches=switches, **said,
        )  # fmt: skip
