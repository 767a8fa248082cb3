"""Judge launch choices by their machine code and rank them in the order in which to try them."""

from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.table import Table

import aot
import candidates
from formats import number, one_line
from mdt_fast.kernels.aot import compile_cases
from mdt_fast.kernels.launches import Choice, Entry

Outcome = dict[str, float] | str
"""The machine code's numbers, or the reason why the choice cannot be used."""


def outcome_of(job: tuple[Entry, Choice, int, str]) -> Outcome:
    """Compile one case, in a separate process. Returns its numbers, or why the code cannot be used."""
    entry, choice, i, arch = job
    case = candidates.cases(entry, arch, choice)[i]
    [numbers] = compile_cases([case], arch)
    if isinstance(numbers, Exception):
        return one_line(numbers)
    occupancy = aot.occupancy(numbers, case.num_warps, aot.SHARED_BYTES[arch])
    if not occupancy:
        shared, registers = numbers["shared_bytes"], numbers["registers"]
        return f"does not fit: {shared} B of shared memory, {registers} registers"
    if numbers.get("unset_registers"):
        return "reads uniform registers that nothing has written (ptxas)"
    if numbers["spill_bytes"]:
        return f"spills {numbers['spill_bytes']} B"
    return {**numbers, "occupancy": occupancy}


def worst_of(outcomes: Sequence[Outcome]) -> Outcome:
    """The first reason against the choice, if there is one, else the numbers with the lowest occupancy."""
    for one in outcomes:
        if isinstance(one, str):
            return one
    return min((one for one in outcomes if isinstance(one, dict)), key=lambda one: one["occupancy"])


def promise(outcome: Outcome) -> tuple[float, ...]:
    """Sort key for outcomes, most promising first. Choices that can run come before those that cannot; then,
    on sm_90 and sm_100, products in the architecture's own instructions (wgmma, tcgen05) come before products
    in those of sm_80; then occupancy, the share of wide loads and stores, and registers decide."""
    if isinstance(outcome, str):
        return (1.0,)
    old = bool(outcome.get("HMMA")) and not any(outcome.get(kind) for kind in ("HGMMA", "UTCMMA"))
    return 0.0, float(old), -outcome["occupancy"], -wide_share(outcome), outcome["registers"]


def wide_share(numbers: dict[str, float]) -> float:
    """The share of global-memory accesses that move 16 bytes."""
    every = sum(numbers.get(kind, 0) for kind in ("LDG", "LDGSTS", "STG"))
    wide = sum(numbers.get(f"{kind}.128", 0) for kind in ("LDG", "LDGSTS", "STG"))
    return wide / every if every else 0.0


def show(entry: Entry, arch: str, judged: Sequence[tuple[Choice, Outcome]], top: int) -> None:
    """Print the ``top`` choices, the rank of the current one and how many cannot be used."""
    table = Table(title=f"{' '.join(entry)} on {arch}", header_style="bold", box=None, title_justify="left")
    for name in ("", "choice", "registers", "shared B", "occupancy", "wide", "matrix"):
        table.add_column(name, justify="left" if name == "choice" else "right", no_wrap=True)
    for place, cells in lines(judged, top):
        table.add_row(str(place), *cells)
    Console(width=max(120, Console().width)).print(table)
    refused = [outcome for _, outcome in judged if isinstance(outcome, str)]
    print(f"{len(judged)} choices, {len(refused)} of them spill, do not fit or do not compile")


def lines(judged: Sequence[tuple[Choice, Outcome]], top: int) -> Iterator[tuple[int, list[str]]]:
    for place, (choice, outcome) in enumerate(judged, start=1):
        if choice and place > top:
            continue
        said = ", ".join(f"{name}={value}" for name, value in choice.items()) or "present"
        if isinstance(outcome, str):
            if not choice:
                yield place, [said, outcome]
            continue
        matrix = [f"{outcome[kind]:g} {kind}" for kind in aot.MATRIX if outcome.get(kind)]
        yield place, [
            said, number(outcome["registers"]), f"{outcome['shared_bytes']:g}", f"{outcome['occupancy']:.0%}",
            f"{wide_share(outcome):.0%}", ", ".join(matrix),
        ]  # fmt: skip
