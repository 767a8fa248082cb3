"""The table that a person reads in the terminal, one per case."""

from rich.console import Console
from rich.table import Table

from formats import interval, memory, number, ratio
from session import CaseResult, Result

BUSY = 1.3
"""p80/p20 of a step's time above which the machine must have been busy with other things too."""


def show(console: Console, result: CaseResult, images: str) -> None:
    """Print a case: what was run, one line per provider, then what has to be said about them."""
    case = result.case
    console.print()
    say(console, case.title, "bold")
    measured = [one for one in result.results if one.ms is not None]
    if measured:
        times = f"{result.repeats} round{'s' * (result.repeats != 1)} in turns" + (
            f" of {result.inner} steps" if result.inner > 1 else ""
        )
        for line in (
            f"step: {case.step}",
            f"input: {images}; {times}; {number(result.gflop_per_image)} GFLOP per image and step",
            f"matmul peak, the best of this run: {number(result.peak)} TFLOP/s "
            f"({case.dtype_name}, side {result.matmul_size})",
        ):
            say(console, line, "dim")
        console.print(_table(measured))
    if any(one.ms is not None and one.ms[2] > BUSY * one.ms[0] for one in measured):
        say(console, "machine busy: times scatter; look at the spread, not the ratio")
    for note in dict.fromkeys(note for one in result.results for note in one.notes):
        names = ", ".join(one.provider for one in result.results if note in one.notes)
        say(console, f"{names}: {note}")


def say(console: Console, line: str, style: str | None = None) -> None:
    """Print a line whole: only a terminal that is too narrow for it breaks it."""
    console.print(line, style=style, highlight=False, markup=False, soft_wrap=True)


def _table(measured: list[Result]) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("provider", no_wrap=True)
    executed = any(one.executed is not None and abs(one.executed - 1) > 5e-4 for one in measured)
    compiled = any(one.compile_s is not None for one in measured)
    columns = ["img/s", "ms/step", "p20-p80", "TFLOP/s", "of peak", "memory", "ratio (p20-p80)"]
    for column in columns + ["FLOPs run"] * executed + ["compile"] * compiled:
        table.add_column(column, justify="right", no_wrap=True)
    for one in measured:
        assert one.ms is not None
        assert one.img_per_s is not None
        assert one.tflop_per_s is not None
        cells = [
            one.provider,
            number(one.img_per_s[1]),
            number(one.ms[1]),
            interval(one.ms[0], one.ms[2]),
            number(one.tflop_per_s[1]),
            f"{one.peak_share:.0%}" if one.peak_share is not None else "",
            memory(one.peak_bytes) if one.peak_bytes is not None else "",
            ratio(one.ratio) if one.ratio is not None else "",
        ]
        if executed:
            cells.append(f"{one.executed:.1%}" if one.executed is not None else "")
        if compiled:
            cells.append(f"{one.compile_s:.0f} s" if one.compile_s is not None else "")
        table.add_row(*cells)
    return table
