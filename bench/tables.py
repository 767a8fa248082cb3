"""The table that a person reads in the terminal, one per case."""

from rich.console import Console
from rich.table import Table

from measure import Spread
from session import CaseResult, Result


def show(console: Console, result: CaseResult, images: str) -> None:
    """Print a case: what was run, one line per provider, then what has to be said about them."""
    case = result.case
    console.print()
    console.print(case.title, style="bold", highlight=False, markup=False)
    measured = [one for one in result.results if one.ms is not None]
    if measured:
        times = f"{result.repeats} round{'s' * (result.repeats != 1)} in turns" + (
            f" of {result.inner} steps" if result.inner > 1 else ""
        )
        for line in (
            f"step: {case.step}",
            f"input: {images}; {times}; {_number(result.gflop_per_image)} GFLOP per image and step",
            f"matmul peak, the best of this run: {_number(result.peak)} TFLOP/s "
            f"({case.dtype_name}, side {result.matmul_size})",
        ):
            console.print(line, highlight=False, markup=False, style="dim")
        console.print(_table(measured))
    for note in dict.fromkeys(one.note for one in result.results if one.note):
        names = ", ".join(one.provider for one in result.results if one.note == note)
        console.print(f"{names}: {note}", highlight=False, markup=False)


def _table(measured: list[Result]) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("provider", no_wrap=True)
    executed = any(one.executed is not None and abs(one.executed - 1) > 5e-4 for one in measured)
    compiled = any(one.compile_s is not None for one in measured)
    columns = ["img/s", "ms/step", "p20-p80", "TFLOP/s", "of peak", "memory", "ratio"]
    for column in columns + ["FLOPs run"] * executed + ["compile"] * compiled:
        table.add_column(column, justify="right", no_wrap=True)
    for one in measured:
        assert one.ms is not None
        assert one.img_per_s is not None
        assert one.tflop_per_s is not None
        cells = [
            one.provider,
            _number(one.img_per_s[1]),
            _number(one.ms[1]),
            _range(one.ms),
            _number(one.tflop_per_s[1]),
            f"{one.peak_share:.0%}" if one.peak_share is not None else "",
            _bytes(one.peak_bytes),
            f"{one.ratio:.2f}x" if one.ratio is not None else "",
        ]
        if executed:
            cells.append(f"{one.executed:.1%}" if one.executed is not None else "")
        if compiled:
            cells.append(f"{one.compile_s:.0f} s" if one.compile_s is not None else "")
        table.add_row(*cells)
    return table


def _number(value: float) -> str:
    """Three significant digits."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def _range(spread: Spread) -> str:
    return f"{_number(spread[0])}-{_number(spread[2])}"


def _bytes(number: int | None) -> str:
    if number is None:
        return ""
    return f"{number / 2**30:.2f} GiB" if number >= 2**30 else f"{number / 2**20:.0f} MiB"
