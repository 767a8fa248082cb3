"""Make Markdown tables from rows, and print them or write them into a document between its two markers.

    python bench/report.py bench/results/cpu.jsonl
    python bench/report.py --bench kernels,attention
    python bench/report.py bench/results/cpu.jsonl --readme docs/cpu.md
    python bench/report.py --goals         the package's goals: met, missed or not measured
    python bench/report.py --plots DIR     also draws the pictures, from all rows together

Without files, all of ``bench/results/*.jsonl`` are read. If a case was measured several times, the latest
counts. The order is whole models (throughput), single ops (kernels), attention and what surrounds a training
step (training).
"""

import argparse
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import command
import goals
import plots
import roofline
from formats import BUSY, interval, memory, number, ratio, sizes
from mdt_fast.errors import UserError
from mdt_fast.files import aside
from rows import Row, mode_of, read, settings

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
SAMPLING = " Sampling: 250 guided steps, extrapolated from the time of one."
SCATTERED = ", scattered"
SCATTER = f" Scattered: the 80th percentile is above {BUSY:g} times the 20th, as on a busy machine."
RESULTS = Path(__file__).parent / "results"


RUN = ("device", "driver", "torch", "triton", "commit", "command")
"""The fields that are the same for all rows of a table."""


def main(argv: Sequence[str] | None = None) -> int:
    """Print the tables or write them into ``--readme``. Returns 0, or 2 after a user error."""
    return command.guarded("report", lambda kept: _main(argv))


def _main(argv: Sequence[str] | None) -> int:
    args = _parser().parse_args(argv)
    if args.goals and (args.readme is not None or args.bench is not None):
        raise UserError(f"--{'readme' if args.readme is not None else 'bench'}: not with --goals")
    benches = command.names("--bench", args.bench, tuple(TABLES)) if args.bench is not None else list(TABLES)
    files = args.files or sorted(RESULTS.glob("*.jsonl"))
    if not files:
        raise UserError(f"no rows: {RESULTS} has no .jsonl files; make some with throughput.py --json FILE")
    rows = read(files)
    if args.plots is not None:
        for path in pictures(rows, args.plots):
            print(f"picture: {path}")
    text = goals.table(rows) if args.goals else markdown(rows, benches)
    if args.readme is None:
        print(text)
    else:
        put(args.readme, text)
        print(f"wrote the table into {args.readme}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = command.Parser(prog="report", description="Make Markdown tables from benchmark rows.")
    parser.add_argument("files", nargs="*", type=Path, help="row files (default: bench/results/*.jsonl)")
    parser.add_argument(
        "--readme", type=Path, help=f"replace the text between {BEGIN} and {END} in this file"
    )
    parser.add_argument(
        "--bench", help=f"comma-separated, from {', '.join(TABLES)} (default: all that have rows)"
    )
    parser.add_argument(
        "--goals", action="store_true", help="instead, list the goals as met, missed or not measured"
    )
    parser.add_argument("--plots", type=Path, metavar="DIR", help="also draw the pictures into this folder")
    return parser


def pictures(rows: Sequence[Row], folder: Path) -> Iterator[Path]:
    """Draw every picture that the rows allow, one per kind and device. Yields the paths written."""
    draws = {
        "throughput": plots.draw, "batches": plots.draw_batches, "kernels": plots.draw_kernels,
        "roofline": roofline.draw, "attention": plots.draw_attention, "head-sizes": roofline.draw_head_sizes,
    }  # fmt: skip
    command.make_folder("--plots", folder)
    devices = list(dict.fromkeys(row["device"] for row in rows))
    for device in devices:
        of_device = [row for row in rows if row["device"] == device]
        slug = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
        for name, draw in draws.items():
            path = folder / (f"{name}-{slug}.png" if len(devices) > 1 else f"{name}.png")
            plots.check_target(path)
            if draw(of_device, path):
                yield path


def markdown(rows: Sequence[Row], benches: Sequence[str] | None = None) -> str:
    """One table for each benchmark, machine, set of versions, commit and command, which stand below it."""
    tables = []
    for bench in TABLES if benches is None else benches:
        runs: dict[tuple[str, ...], list[Row]] = {}
        for row in _latest(rows, bench):
            runs.setdefault(tuple(str(row[key]) for key in RUN), []).append(row)
        for run in [run for run, some in runs.items() if not any(row["metric"] == "ms" for row in some)]:
            del runs[run]  # failed or skipped: nothing in it has a time
        for run, of_run in runs.items():
            text = TABLES[bench](run, of_run)
            tables.append(text + (SCATTER if f"{SCATTERED} |" in text else ""))
    if not tables:
        what = "" if benches is None else f" of {', '.join(benches)}"
        raise UserError(f"nothing{what} was measured in these rows")
    return "\n\n".join(tables)


def put(
    readme: Path, text: str, begin_marker: str = BEGIN, end_marker: str = END, option: str = "--readme"
) -> None:
    """Replace the text between the markers. Raises ``UserError`` if the file or a marker is missing."""
    before, begin, end = between(readme, begin_marker, end_marker, option)
    try:
        with aside(readme) as file:
            file.write_text(f"{before[: begin + len(begin_marker)]}\n{text}\n{before[end:]}")
    except OSError as error:
        raise UserError(f"{option}: cannot write {str(readme)!r}: {error.strerror}") from None


def between(readme: Path, begin_marker: str, end_marker: str, option: str) -> tuple[str, int, int]:
    """The file's text and the positions of its markers, also for checking before anything is measured. Raises
    ``UserError`` if the file or a marker is missing."""
    try:
        before = readme.read_text()
    except OSError as error:
        raise UserError(f"{option}: cannot read {str(readme)!r}: {error.strerror}") from None
    begin, end = before.find(begin_marker), before.find(end_marker)
    if begin < 0 or end < begin:
        raise UserError(
            f"{option}: {str(readme)!r} lacks the markers {begin_marker} and {end_marker}, in this order"
        )
    return before, begin, end


def _latest(rows: Sequence[Row], bench: str) -> list[Row]:
    """The latest row of each (device, case, provider, metric), in order of first appearance, if it was
    measured. Rows of one commit that differ in their settings are cases of their own; a later commit's rows
    replace all of them."""
    case = ("mode", "model", "batch") if bench == "throughput" else ("mode", "op", "shape")
    found: dict[tuple[str, ...], dict[tuple[str, ...], Row]] = {}
    for row in rows:
        if row["bench"] == bench and set(case) <= set(row) and row.get("op") not in plots.RATES:
            keys = ("device", *case, "dtype", "provider", "metric")
            same = found.setdefault((mode_of(row), *(str(row[key]) for key in keys)), {})
            for key in [key for key, other in same.items() if other["commit"] != row["commit"]]:
                del same[key]
            same[settings(row)] = row
    return [row for same in found.values() for row in same.values() if row["p50"] is not None]


def _throughput(run: tuple[str, ...], rows: Sequence[Row]) -> str:
    lines = [
        "| mode | model, batch, dtype | provider | img/s | ms/step (p20-p80) | rounds | of peak | memory "
        "| ratio (p20-p80) |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for (mode, model, batch, dtype), metrics in plots.group(rows).items():
        for provider in metrics["img_per_s"]:
            p50 = {metric: by[provider]["p50"] for metric, by in metrics.items() if provider in by}
            ms = metrics["ms"][provider]
            half = " autocast" if dtype == "bfloat16" else ""
            cells = [
                mode,
                f"{model}, {batch}, {dtype}{half}",
                f"`{provider}`",
                number(p50["img_per_s"]),
                f"{number(ms['p50'])} ({interval(ms['p20'], ms['p80'])}){_scattered(ms)}",
                str(ms.get("rounds", "")),
                f"{p50['peak_share']:.0%}" if "peak_share" in p50 else "",
                memory(p50["peak_bytes"]) if "peak_bytes" in p50 else "",
                _ratio({metric: by[provider] for metric, by in metrics.items() if provider in by}),
            ]
            lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        f"{origin(run)} Of peak: of the best matmul rate of the same run. Memory: peak. "
        "Ratio: speed over the reference's in the same round, the median of all rounds."
        + (SAMPLING if any(row["mode"].startswith("sample") for row in rows) else ""),
    ]
    return "\n".join(lines)


def _kernels(run: tuple[str, ...], rows: Sequence[Row]) -> str:
    """A table with a line for each op, shape, mode and provider."""
    lines = [
        "| op | shape | mode | provider | us (p20-p80) | GB/s | TFLOP/s | of roof | vs eager (p20-p80) |",
        "|---|---|---|---|---:|---:|---:|---:|---:|",
    ]
    cases: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in rows:
        shape = f"{sizes(row['shape'])}, {row['dtype']}"
        cases.setdefault((row["op"], shape, row["mode"], row["provider"]), {})[row["metric"]] = row
    for (op, shape, mode, provider), metrics in cases.items():
        if "ms" not in metrics:
            continue
        us = [1e3 * metrics["ms"][key] for key in ("p20", "p50", "p80")]
        p50 = {metric: row["p50"] for metric, row in metrics.items()}
        cells = [
            f"`{op}`",
            shape,
            mode,
            f"`{provider}`",
            f"{number(us[1])} ({interval(us[0], us[2])}){_scattered(metrics['ms'])}",
            number(p50["gb_per_s"]) if "gb_per_s" in p50 else "",
            number(p50["tflop_per_s"]) if "tflop_per_s" in p50 else "",
            f"{p50['roof_share']:.0%}" if "roof_share" in p50 else "",
            _ratio(metrics),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        f"{origin(run)} GB/s: the least bytes by the op's formula, over the time. Of roof: the time of a "
        "copy of as many bytes in the same rounds (or, if longer, of the matmul FLOPs at the best rate of "
        "the run) over the op's. vs eager: speed over plain PyTorch's in the same round, the median of all.",
    ]
    return "\n".join(lines)


def _attention(run: tuple[str, ...], rows: Sequence[Row]) -> str:
    """A table of TFLOP/s and the speed-up over attention without bias. It has a line for each mode, head size
    and provider, and a column for each length."""
    lengths = sorted({_length(row) for row in rows})
    lines = [
        f"| mode | heads, dtype | provider | {' | '.join(text for *_, text in lengths)} |",
        f"|---|---|---|{'---:|' * len(lengths)}",
    ]
    cases: dict[tuple[str, ...], dict[tuple[int, bool, str], dict[str, Row]]] = {}
    for row in rows:
        heads = f"{row['shape']['H']} of {row['shape']['d']}, {row['dtype']}"
        by_length = cases.setdefault((row["mode"], heads, row["provider"]), {})
        by_length.setdefault(_length(row), {})[row["metric"]] = row
    for (mode, heads, provider), by_length in sorted(cases.items(), key=lambda case: case[0][:2]):
        cells = [mode, heads, f"`{provider}`"]
        for length in lengths:
            metrics = by_length.get(length, {})
            rate = number(metrics["tflop_per_s"]["p50"]) if "tflop_per_s" in metrics else ""
            vs = f" ({metrics['ratio']['p50']:.2f}x)" if "ratio" in metrics else ""
            cells.append(rate + vs + (_scattered(metrics["ms"]) if rate and "ms" in metrics else ""))
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        f"{origin(run)} TFLOP/s, and in brackets the speed over that of `sdpa-no-bias` (PyTorch's "
        "attention without any bias) in the same round, the median of all. FLOPs: 4 B H M M d forward, 2.5 "
        "times that backward.",
    ]
    return "\n".join(lines)


def _training(run: tuple[str, ...], rows: Sequence[Row]) -> str:
    """A table with a line for each measurement."""
    lines = ["| what | shape | provider | metric | p50 (p20-p80) | rounds |", "|---|---|---|---|---:|---:|"]
    for row in rows:
        unit, scale = ("%", 100) if row["unit"] == "share" else (row["unit"], 1)
        p20, p50, p80 = (scale * row[key] for key in ("p20", "p50", "p80"))
        value = f"{number(p50)} {unit} ({interval(p20, p80)}){_scattered(row)}"
        cells = [row["op"], sizes(row["shape"]), row["provider"], row["metric"], value, str(row["rounds"])]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", origin(run)])


def _length(row: Row) -> tuple[int, bool, str]:
    """A column key that sorts by tokens and ends with the column's title."""
    shape = row["shape"]
    B, L, K = shape["B"], shape["L"], shape.get("K")
    return L, K is not None, f"{L} tokens" + (f", {K} kept" if K is not None else "") + f", batch {B}"


def _ratio(metrics: dict[str, Row]) -> str:
    """The ratio, in bold if it is a slow-down by more than the spread of the rounds."""
    row = metrics.get("ratio")
    if row is None:
        return ""
    text = ratio((row["p20"], row["p50"], row["p80"]))
    return f"**{text}, slower**" if (row["p80"] or row["p50"]) < 1 else text


def _scattered(row: Row) -> str:
    """A mark for times that scatter as on a busy machine."""
    return SCATTERED if row["p20"] and row["p80"] and row["p80"] > BUSY * row["p20"] else ""


def origin(run: tuple[str, ...]) -> str:
    device, driver, torch_version, triton, commit, line = run
    where = f"{device}, driver {driver}" if driver != "None" else device
    return f"{where}; torch {torch_version}, triton {triton}; commit {commit}; `{line}`."


TABLES = {"throughput": _throughput, "kernels": _kernels, "attention": _attention, "training": _training}


if __name__ == "__main__":
    sys.exit(main())
