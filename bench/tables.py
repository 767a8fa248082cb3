"""The tables shown in the terminal, one per case."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from formats import BUSY, interval, memory, number, ratio
from measure import Spread

if TYPE_CHECKING:
    import points
    from session import CaseResult, Result

WIDTH = 140
"""Columns of the widest table, used even if the terminal is narrower or there is none."""


def show(console: Console, result: CaseResult, images: str) -> None:
    """Print a case: what was run, one line per provider, then notes about them."""
    case = result.case
    console.print()
    say(console, case.title, "bold")
    measured = [one for one in result.results if one.ms is not None]
    if measured:
        times = f"{result.repeats} interleaved round{'s' * (result.repeats != 1)}" + _turns(result)
        for line in (
            f"step: {case.step}",
            f"input: {images}; {times}; {number(result.gflop_per_image)} GFLOP per image and step",
            f"matmul peak, the best of this run: {number(result.peak)} TFLOP/s "
            f"({case.dtype_name}, side {result.matmul_size})",
        ):
            say(console, line, "dim")
        console.print(_table(measured))
    _say_busy(console, measured)
    _say_notes(console, [(one.provider, one.notes) for one in result.results])


def _turns(result: CaseResult) -> str:
    counts = sorted(set(result.steps.values()))
    if counts == [1]:
        return ""
    return f" of {counts[0]} steps" if len(counts) == 1 else f" of {counts[0]} to {counts[-1]} steps"


def show_points(
    console: Console,
    title: str,
    roofs: Sequence[str],
    results: Sequence[points.Result],
    base: str,
    told: set[tuple[str, str]],
) -> None:
    """Print an op at one shape: the machine's roofs, one line per mode and provider, then notes that were not
    yet ``told`` about the same provider (they are added to it)."""
    console.print()
    say(console, title, "bold")
    measured = [one for one in results if one.ms is not None]
    if measured:
        for roof in roofs:
            say(console, roof, "dim")
        console.print(_points_table(measured, base))
    _say_busy(console, measured)
    notes_of = [
        (f"{one.provider} {one.mode}", [note for note in one.notes if (one.provider, note) not in told])
        for one in results
    ]
    told.update((one.provider, note) for one in results for note in one.notes)
    _say_notes(console, notes_of)


def _points_table(measured: Sequence[points.Result], base: str) -> Table:
    columns: dict[str, tuple[list[Spread | None], Callable[[Spread], str]]] = {
        "ms": ([one.ms for one in measured], lambda q: number(q[1])),
        "p20-p80": ([one.ms for one in measured], lambda q: interval(q[0], q[2])),
        "GB/s": ([one.gb_per_s for one in measured], lambda q: number(q[1])),
        "TFLOP/s": ([one.tflop_per_s for one in measured], lambda q: number(q[1])),
        "of roof": ([one.roof_share for one in measured], lambda q: f"{q[1]:.0%}"),
        f"vs {base} (p20-p80)": ([one.ratio for one in measured], ratio),
    }
    columns = {name: column for name, column in columns.items() if any(column[0])}
    table = Table(box=None, pad_edge=False)
    for name in ("mode", "provider", *columns):
        table.add_column(name, justify="left" if name in ("mode", "provider") else "right", no_wrap=True)
    for i, one in enumerate(measured):
        cells = [text(values[i]) if values[i] is not None else "" for values, text in columns.values()]
        table.add_row(one.mode, one.provider, *cells)
    return table


def _say_busy(console: Console, measured: Sequence[Result | points.Result]) -> None:
    if any(one.ms is not None and one.ms[2] > BUSY * one.ms[0] for one in measured):
        say(console, "machine busy: times scatter; look at the spread, not the ratio")


def _say_notes(console: Console, notes_of: Sequence[tuple[str, Sequence[str]]]) -> None:
    """Print each note once, after the names of all the providers it applies to."""
    for note in dict.fromkeys(note for _, notes in notes_of for note in notes):
        say(console, f"{', '.join(name for name, notes in notes_of if note in notes)}: {note}")


def say(console: Console, line: str, style: str | None = None) -> None:
    """Print a line without wrapping it; only a terminal that is too narrow breaks it."""
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
