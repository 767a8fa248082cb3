"""Find the best launch choices in the rows of ``tune.py`` and write them to ``kernels/tuned.json``."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, log
from pathlib import Path

from rich.console import Console
from rich.table import Table

import candidates
from mdt_fast.files import aside
from mdt_fast.kernels import launches
from mdt_fast.kernels.launches import Choice, Entry
from measure import MIN_ROUNDS
from promise import outcome_of
from rows import Row

MIN_GAIN = 1.02
"""The smallest speed-up over the current choice for which it is replaced."""


def source_of(kernel: str) -> str:
    """A digest of the room's code, which a measurement depends on besides the choice."""
    folder = Path(launches.__file__).parent / candidates.KERNELS[kernel].room
    text = b"".join(path.read_bytes() for path in sorted(folder.glob("*.py")))
    return hashlib.sha256(text).hexdigest()[:12]


def key_of(choice: Choice) -> str:
    """A key that is equal for equal choices."""
    return json.dumps(dict(choice), sort_keys=True)


@dataclass(frozen=True)
class Winner:
    """A choice for an entry, with its speed-up over the current one at each point as (p20, p50)."""

    entry: Entry
    arch: str
    device: str
    choice: Choice
    points: dict[str, tuple[float, float]]

    @property
    def gain(self) -> float:
        """The geometric mean of the speed-up over all points."""
        return exp(sum(log(p50) for _, p50 in self.points.values()) / len(self.points))

    @property
    def worth_it(self) -> bool:
        return self.gain >= MIN_GAIN and all(p20 >= 1 for p20, _ in self.points.values())


def winners(rows: Sequence[Row], kernels: Sequence[str]) -> list[list[Winner]]:
    """For each entry, architecture and device its choices, best first. Only choices timed at all of its
    points, in five rounds or more, are included; the latest row of a choice counts."""
    found: dict[tuple[str, str, str, str], dict[str, dict[str, Row]]] = {}
    for row in rows:
        if row["bench"] != "tune" or row["op"] not in kernels or row["metric"] != "ratio":
            continue
        paced = row.get("late", 0) > row["rounds"] / 2  # by the host: says nothing about the choice
        if row["rounds"] >= MIN_ROUNDS and not paced and row["source"] == source_of(row["op"]):
            by_choice = found.setdefault((row["op"], row["shape"], row["arch"], row["device"]), {})
            by_choice.setdefault(key_of(row["switches"]), {})[row["point"]] = row
    ranked = []
    for (kernel, shape, arch, device), by_choice in found.items():
        every = {point for by_point in by_choice.values() for point in by_point}
        complete = [
            Winner(
                (kernel, shape),
                arch,
                device,
                json.loads(choice),
                {p: (r["p20"], r["p50"]) for p, r in by.items()},
            )
            for choice, by in by_choice.items()
            if by.keys() == every
        ]
        ranked.append(sorted(complete, key=lambda one: -one.gain))
    return [some for some in ranked if some]


def conclude(rows: Sequence[Row], kernels: Sequence[str], write: bool) -> None:
    """Print the winners; with ``write``, also write them to ``kernels/tuned.json``."""
    table = Table(header_style="bold", box=None)
    for name in ("kernel", "shape class", "arch", "best choice", "gain", "by point"):
        table.add_column(name, no_wrap=True, justify="right" if name == "gain" else "left")
    taken = []
    for ranked in winners(rows, kernels):
        best = next((one for one in ranked if one.worth_it and holds(one)), None)
        shown = best or ranked[0]
        if best is not None:
            taken.append(best)
        said = ", ".join(f"{name}={value}" for name, value in shown.choice.items())
        by_point = ", ".join(f"{point} {p50:.2f}x" for point, (_, p50) in shown.points.items())
        kept = "" if best is not None else " (the current one stays)"
        table.add_row(
            *shown.entry, f"{shown.arch}, {shown.device}", said + kept, f"{shown.gain:.2f}x", by_point
        )
    if not table.row_count:
        print("no choice was timed at all of its points yet")
        return
    Console(width=max(150, Console().width)).print(table)
    if write and taken:
        put(taken, launches.TUNED)
        print(
            f"{len(taken)} choices written into {launches.TUNED}; check them: python bench/kernels.py --aot"
        )
    elif taken:
        print(
            f"{len(taken)} are faster by {MIN_GAIN - 1:.0%} or more; --write puts them into {launches.TUNED}"
        )


def holds(winner: Winner) -> bool:
    """Whether a choice compiles without spills for everything that its entry serves."""
    number_of = len(candidates.cases(winner.entry, winner.arch, winner.choice))
    jobs = ((winner.entry, winner.choice, i, winner.arch) for i in range(number_of))
    return not any(isinstance(outcome_of(job), str) for job in jobs)


def put(taken: Sequence[Winner], path: Path) -> None:
    """Add the choices to the data file; its other entries stay."""
    table = json.loads(path.read_text())
    for one in taken:
        kernel, shape = one.entry
        by_shape = table.setdefault(kernel, {}).setdefault(one.arch, {})
        by_shape[shape] = dict(one.choice)
    with aside(path) as file:
        file.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")
