"""The package's goals, as data, and what the rows say about each: met, missed or not measured.

Only figures from the same machine are compared with each other. Rates in img/s were set for one H200.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import itemgetter

from plots import RATES
from providers import NAMES, precision
from rows import Row, few, mode_of, settings
from sanitize import CALLS
from steps import SAMPLING_STEPS

Found = tuple[float, str] | None
"""A value and the case it belongs to; None if it was not measured."""
Measure = Callable[["Rows"], Found]

XL, S = "MDTv2_XL_2", "MDTv2_S_2"
SMALLER = ("MDTv2_L_2", "MDTv2_B_2", S)
FLOAT8 = tuple(name for name in NAMES if "float8" in precision(name))
OURS = tuple(name for name in NAMES if name.startswith("fast") and name not in FLOAT8)
COMPILED = tuple(name for name in NAMES if name.startswith("reference-"))
ADALN = ("ln_modulate", "gate_residual", "gate_residual_ln_modulate")
TOKENS = ("gather_tokens", "unmask_tokens", "merge_tokens")
OPTIMIZERS = ("adan_step", "adamw_step")
ROOF = "sdpa-no-bias"


@dataclass(frozen=True)
class Goal:
    """``bar`` is the lowest value of ``measure`` that meets the goal (or, with ``most``, the highest)."""

    what: str
    bar: float
    unit: str
    measure: Measure
    most: bool = False
    on_cpu: bool = False
    gpu: str = ""
    """Must be part of the device's name: the kind of GPU that a rate was set for."""

    def met(self, value: float) -> bool:
        return value <= self.bar if self.most else value >= self.bar


KEYS = ("bench", "op", "model", "mode", "batch", "shape", "dtype", "provider", "metric")


class Rows:
    """The measured rows of one device, preferably with enough rounds: ``latest`` of each case, and
    ``of_runs``, the latest of each case in each run."""

    def __init__(self, rows: Sequence[Row]):
        self.latest: dict[tuple[object, ...], Row] = {}
        self.of_runs: dict[tuple[object, ...], Row] = {}
        for row in rows:
            if row["p50"] is None or row.get("op") in RATES:
                continue
            if mode_of(row) != str(row.get("mode")):  # goals are for ddpm
                continue
            keys = (*KEYS, "note") if row["bench"] == "account" else KEYS  # there the note names the line
            case = tuple(str(row.get(key)) for key in keys)
            for kept, key in ((self.latest, case), (self.of_runs, (*case, *run(row)))):
                if not (few(row) and key in kept and not few(kept[key])):
                    kept[key] = row

    def of(self, every: bool = False, /, **wanted: object) -> list[Row]:
        """The rows whose keys have these values, or one of them if a tuple is given. ``every``: of every run,
        not only the latest."""
        return [
            row
            for row in (self.of_runs if every else self.latest).values()
            if all(
                row.get(key) in value if isinstance(value, tuple) else row.get(key) == value
                for key, value in wanted.items()
            )
        ]


PARTIAL = "; without "
UNKEPT = "; of files that no commit holds"


def run(row: Row) -> tuple[str | None, str]:
    """What a row has in common with those measured in the same run."""
    return row["commit"], row["command"]


def comparable(a: Row, b: Row) -> bool:
    """Whether two rows are of one commit and measured with the same settings, if not in one run."""
    return a["commit"] == b["commit"] and settings(a) == settings(b)


def named(text: str, *rows: Row) -> str:
    """A case's text, with reservations about its rows."""
    text += "; too few rounds" if any(map(few, rows)) else ""
    dirty = any(str(row["commit"]).endswith("-dirty") for row in rows)
    return text + (UNKEPT if dirty else "")


def rate(model: str, mode: str, **more: object) -> Measure:
    """Our best img/s at any batch, whether timed next to the reference, by repeating one step or, for
    sampling, in an account. Rows measured at a clean commit take precedence."""

    def measure(rows: Rows) -> Found:
        common = {"model": model, "mode": mode, "provider": OURS, **more}
        found = [
            (row["p50"], named(f"{row['provider']}, batch {row['batch']}", row))
            for row in rows.of(bench="throughput", metric="img_per_s", **common)
        ]
        steps = 1 if mode == "train" else SAMPLING_STEPS
        for row in rows.of(bench="breakdown", metric="ms", **common):
            case = f"{row['provider']}, batch {row['batch']}, one step over and over"
            found.append((1e3 * row["batch"] / row["p50"] / steps, named(case, row)))
        lines = "fast", "fast with bfloat16 weights"
        for row in rows.of(bench="account", metric="ms", note=lines, **common) if mode == "sample" else []:
            case = f"{row['note']}, batch {row['batch']}, by ten steps"
            found.append((1e3 * row["batch"] / row["p50"] / steps, named(case, row)))
        return max(found, key=lambda one: (UNKEPT not in one[1], one[0]), default=None)

    return measure


def against(
    model: str, mode: str, batch: int | None, theirs: Sequence[str], metric: str, dtypes: tuple[str, str],
    *, one_run: bool = False,
) -> Measure:  # fmt: skip
    """Our best over their best at one batch: the highest img/s, or the lowest memory. Only rows of one commit
    and the same settings are compared; ``one_run`` admits only those of one run, for values that differ
    between runs: CPU times, and what counts as memory. Of several such pairs the latest with enough rounds
    counts. Speed over the reference of the same run is the median of the ratios round by round."""
    pick, value = min if metric == "peak_bytes" else max, itemgetter("p50")
    same = (lambda a, b: run(a) == run(b)) if one_run else comparable

    def measure(rows: Rows) -> Found:
        common = {"bench": "throughput", "metric": metric, "model": model, "mode": mode}
        if batch is not None:
            common["batch"] = batch
        ours = rows.of(True, **common, provider=OURS, dtype=dtypes[0])
        other = rows.of(True, **common, provider=tuple(theirs), dtype=dtypes[1])
        pairs = []
        for one in other:
            at = one["batch"]
            beside = [row for row in ours if row["batch"] == at and same(row, one)]
            if beside:
                b = pick((row for row in other if row["batch"] == at and same(row, one)), key=value)
                pairs.append((pick(beside, key=value), b))
        if not pairs:
            return None
        a, b = max(pairs, key=lambda p: (p[0]["batch"], not any(map(few, p)), p[0]["time"], p[1]["time"]))
        apart = "" if run(a) == run(b) else "; of two runs"
        newest = max((row for row in ours if row["batch"] == a["batch"]), key=itemgetter("time"))
        apart += "; of an earlier run" if newest["time"] > a["time"] and run(newest) != run(a) else ""
        over = f" over {b['provider']}" if len(theirs) > 1 else ""
        return _over(rows, a, b), named(f"{a['provider']}{over}, batch {a['batch']}{apart}", a, b)

    return measure


def _over(rows: Rows, a: Row, b: Row) -> float:
    """``a`` over ``b``: by the rounds' ratios if one run has them, else by the medians."""
    if (a["metric"], b["provider"], a["dtype"]) == ("img_per_s", "reference", b["dtype"]) and run(a) == run(
        b
    ):
        keys = ("bench", "model", "mode", "batch", "dtype", "provider")
        for row in rows.of(True, metric="ratio", **{key: a[key] for key in keys}):
            if run(row) == run(a):
                return float(row["p50"])
    return float(a["p50"] / b["p50"])


def attention(other: str, *modes: str) -> Measure:
    """The lowest speed-up of our best form over ``other`` for any mode, head size and mask at 256 tokens."""

    def measure(rows: Rows) -> Found:
        by_case: dict[str, dict[str, Row]] = {}
        for row in rows.of(bench="attention", metric="ms", mode=modes, dtype="bfloat16"):
            if row["shape"]["L"] == 256 and row["shape"]["d"] in (64, 72):
                masked = "masked" if "K" in row["shape"] else "all tokens"
                case = f"{row['mode']}, d={row['shape']['d']}, {masked}"
                by_case.setdefault(case, {})[row["provider"]] = row
        found = []
        for case, by in by_case.items():
            ours = [row for name, row in by.items() if name.startswith("triton")]
            if ours and other in by:
                best = min(ours, key=lambda row: row["p50"])
                found.append((by[other]["p50"] / best["p50"], named(case, by[other], best)))
        return min(found, default=None)

    return measure


def roof(ops: tuple[str, ...]) -> Measure:
    """The lowest share of the roof that any of the ops reaches, in any mode."""

    def measure(rows: Rows) -> Found:
        shares = rows.of(bench="kernels", metric="roof_share", provider="fast", op=ops)
        return min(((row["p50"], named(f"{row['op']} {row['mode']}", row)) for row in shares), default=None)

    return measure


def fewer_ops(rows: Rows) -> Found:
    """Operations dispatched in a training step, over the reference's: of XL/2, or else of a smaller model
    with the default switches at its worst batch."""
    for model in (XL, *SMALLER):
        found = rows.of(bench="account", metric="ops", mode="train", model=model)
        base = {row["batch"]: row["p50"] for row in found if row["provider"] == "reference"}
        ours = [row for row in found if row["provider"] != "reference" and row["batch"] in base]
        shares = [
            (row["p50"] / base[row["batch"]], f"{row['note']}, batch {row['batch']}", row["note"])
            for row in ours
        ]
        if shares and model == XL:
            return min(shares)[:2]
        shares = [share for share in shares if share[2] == "fast"]
        if shares:
            share, case, _ = max(shares)
            return share, f"{case}; of {model}, not {XL}"
    return None


def sanitized(rows: Rows) -> Found:
    """The worse of memcheck and racecheck, each over as many of the kernels as any run of it."""
    found = []
    for tool in ("memcheck", "racecheck"):
        every = rows.of(bench="sanitize", metric="clean", op=tool)
        lacking = [[call for call in CALLS if call not in row["shape"].split(",")] for row in every]
        if not every:
            return None
        least = min(map(len, lacking))
        for row, without in zip(every, lacking):
            if len(without) == least:
                found.append((row["p50"], tool + (PARTIAL + ", ".join(without) if without else "")))
    return min(found)


BF16, F32 = ("bfloat16", "bfloat16"), ("float32", "float32")
EAGER = ("reference",)
GOALS = (
    Goal("train XL/2, bfloat16, one H200", 360, "img/s", rate(XL, "train", dtype="bfloat16"), gpu="H200"),
    Goal("train XL/2, float8, one H200", 480, "img/s", rate(XL, "train", provider=FLOAT8), gpu="H200"),
    Goal("train XL/2 over eager float32", 8, "x",
         against(XL, "train", 32, EAGER, "img_per_s", ("bfloat16", "float32"))),
    Goal("train XL/2 over eager bfloat16", 3, "x", against(XL, "train", 32, EAGER, "img_per_s", BF16)),
    Goal("train XL/2 over compiled bfloat16", 1.5, "x",
         against(XL, "train", 32, COMPILED, "img_per_s", BF16)),
    Goal("train XL/2 at batch 4 over compiled", 3, "x", against(XL, "train", 4, COMPILED, "img_per_s", BF16)),
    Goal("peak memory, XL/2, batch 32, over compiled", 0.45, "x",
         against(XL, "train", 32, COMPILED, "peak_bytes", BF16, one_run=True), most=True),
    Goal("sample XL/2, 250 steps, one H200", 4, "img/s", rate(XL, "sample", dtype="bfloat16"), gpu="H200"),
    Goal("sample XL/2, batch 1, over compiled", 2, "x",
         against(XL, "sample", 1, COMPILED, "img_per_s", BF16)),
    Goal("attention forward over attention without bias", 0.8, "x", attention(ROOF, "fwd")),
    Goal("attention forward and backward over the same", 0.6, "x", attention(ROOF, "fwd+bwd")),
    Goal("attention over FlexAttention", 2, "x", attention("flex", "fwd", "fwd+bwd")),
    Goal("attention over SDPA with a bias", 3, "x", attention("sdpa", "fwd", "fwd+bwd")),
    Goal("adaLN kernels, of the copy's rate", 0.85, "1", roof(ADALN)),
    Goal("token kernels, of the copy's rate", 0.85, "1", roof(TOKENS)),
    Goal("optimiser steps, of the copy's rate", 0.85, "1", roof(OPTIMIZERS)),
    Goal("ops dispatched in a training step over eager", 0.25, "x", fewer_ops, most=True),
    Goal("compute-sanitizer, memcheck and racecheck: clean", 1, "1", sanitized),
    Goal("CPU, train S/2 over eager, float32", 1.25, "x",
         against(S, "train", None, EAGER, "img_per_s", F32, one_run=True), on_cpu=True),
    Goal("CPU, peak memory of S/2 over eager, float32", 0.6, "x",
         against(S, "train", None, EAGER, "peak_bytes", F32, one_run=True), most=True, on_cpu=True),
)  # fmt: skip


def table(rows: Sequence[Row]) -> str:
    """A table with a line for each goal and device it was measured on, or one that says it was not."""
    lines = ["| goal | bar | measured | | device |", "|---|---:|---:|---|---|"]
    devices: dict[str, list[Row]] = {}
    for row in rows:
        devices.setdefault(row["device"], []).append(row)
    of_device = {name: (some[0]["driver"] is None, Rows(some)) for name, some in devices.items()}
    for goal in GOALS:
        bar = f"{'≤' if goal.most else '≥'} {_text(goal.bar, goal.unit)}"
        found = [
            (name, value)
            for name, (on_cpu, some) in of_device.items()
            if on_cpu == goal.on_cpu and goal.gpu in name and (value := goal.measure(some)) is not None
        ]
        for name, (value, case) in found:
            partial = " so far" if PARTIAL in case else ""
            said = f"met{partial}" if goal.met(value) else "**missed**"
            lines.append(f"| {goal.what} | {bar} | {_text(value, goal.unit)} ({case}) | {said} | {name} |")
        if not found:
            lines.append(f"| {goal.what} | {bar} | | not measured | |")
    return "\n".join(lines)


def _text(value: float, unit: str) -> str:
    if unit == "1":
        return f"{value:.0%}"
    return f"{value:.2f}x" if unit == "x" else f"{value:.3g} {unit}"
