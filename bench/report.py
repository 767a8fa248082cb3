"""A Markdown table from rows, printed or put into a README between its two markers.

    python bench/report.py bench/results/cpu.jsonl
    python bench/report.py --readme README.md

Without files all of ``bench/results/*.jsonl`` are read. Where a case was measured several times, the latest
counts.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import plots
from formats import interval, memory, number, ratio
from mdt_fast.errors import UserError
from rows import Row, read

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
SAMPLING = " Sampling: 250 guided steps, extrapolated from the time of one."
RESULTS = Path(__file__).parent / "results"


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table, or write it into ``--readme``. Returns 0, or 2 after a mistake of the user."""
    parser = Parser(prog="report", description="A Markdown table from the bench's rows.", allow_abbrev=False)
    parser.add_argument("files", nargs="*", type=Path, help="row files (default: bench/results/*.jsonl)")
    parser.add_argument(
        "--readme", type=Path, help=f"replace what stands between {BEGIN} and {END} in this file"
    )
    try:
        args = parser.parse_args(argv)
        files = args.files or sorted(RESULTS.glob("*.jsonl"))
        if not files:
            raise UserError(
                f"no rows: {RESULTS} has no .jsonl files; make some with throughput.py --json FILE"
            )
        text = markdown(read(files))
        if args.readme is None:
            print(text)
        else:
            put(args.readme, text)
            print(f"wrote the table into {args.readme}")
        return 0
    except UserError as error:
        print(f"report: error: {error}", file=sys.stderr)
        return 2


def markdown(rows: Sequence[Row]) -> str:
    """One table per machine, versions, commit and command, the commit and command below it."""
    latest = _latest(rows)
    if not latest:
        raise UserError("no throughput was measured in these rows")
    runs: dict[tuple[str, ...], list[Row]] = {}
    for row in latest:
        run = tuple(str(row[key]) for key in ("device", "driver", "torch", "triton", "commit", "command"))
        runs.setdefault(run, []).append(row)
    return "\n\n".join(_table(run, of_run) for run, of_run in runs.items())


def put(readme: Path, text: str) -> None:
    """Replace what stands between the markers. ``UserError`` if the file or a marker is missing."""
    try:
        before = readme.read_text()
    except OSError as error:
        raise UserError(f"--readme: cannot read {str(readme)!r}: {error.strerror}") from None
    begin, end = before.find(BEGIN), before.find(END)
    if begin < 0 or end < begin:
        raise UserError(f"--readme: {str(readme)!r} lacks the markers {BEGIN} and {END}, in this order")
    try:
        readme.write_text(f"{before[: begin + len(BEGIN)]}\n{text}\n{before[end:]}")
    except OSError as error:
        raise UserError(f"--readme: cannot write {str(readme)!r}: {error.strerror}") from None


def _latest(rows: Sequence[Row]) -> list[Row]:
    """The measured rows, of each (device, case, provider, metric) the last; in the order of first mention."""
    found: dict[tuple[str, ...], Row] = {}
    for row in rows:
        if row["bench"] == "throughput" and "model" in row:
            keys = ("device", "mode", "model", "batch", "dtype", "provider", "metric")
            found[tuple(str(row[key]) for key in keys)] = row
    return [row for row in found.values() if row["p50"] is not None]


def _table(run: tuple[str, ...], rows: Sequence[Row]) -> str:
    device, driver, torch_version, triton, commit, command = run
    lines = [
        "| mode | model, batch, dtype | provider | img/s | ms/step (p20-p80) | rounds | of peak | memory "
        "| ratio (p20-p80) |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for (mode, model, batch, dtype), metrics in plots.group(rows).items():
        for provider in metrics["img_per_s"]:
            p50 = {metric: by[provider]["p50"] for metric, by in metrics.items() if provider in by}
            ms, to = metrics["ms"][provider], metrics.get("ratio", {}).get(provider)
            half = " autocast" if dtype == "bfloat16" else ""
            cells = [
                mode,
                f"{model}, {batch}, {dtype}{half}",
                f"`{provider}`",
                number(p50["img_per_s"]),
                f"{number(ms['p50'])} ({interval(ms['p20'], ms['p80'])})",
                str(ms.get("rounds", "")),
                f"{p50['peak_share']:.0%}" if "peak_share" in p50 else "",
                memory(p50["peak_bytes"]) if "peak_bytes" in p50 else "",
                ratio((to["p20"], to["p50"], to["p80"])) if to is not None else "",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    where = f"{device}, driver {driver}" if driver != "None" else device
    lines += [
        "",
        f"{where}; torch {torch_version}, triton {triton}; commit {commit}; `{command}`. "
        "Of peak: of the best matmul rate of the same run. Memory: peak. "
        "Ratio: speed over the reference's in the same round, the median of all rounds."
        + (SAMPLING if any(row["mode"] == "sample" for row in rows) else ""),
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
