"""Tables and figures of ``convergence.py``, made only from its rows."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from curves import AXES, Band, Curve, columns, coverage, same_within_bands, speedup, targets_of
from formats import number
from learners import STUDIES
from mdt_fast.errors import UserError
from plots import finish, save
from report import origin
from rows import Row

COLORS = ("#6b6b6b", "#d08a3c", "#1d4f8c", "#2e7d4f", "#b0506f", "#8a6fb0", "#00a0a0")
LABELS = {
    "step": "updates",
    "seconds": "seconds of training (on a CPU: computing)",
    "flops": "FLOPs executed",
}
GRID_STEPS = 4

Learners = dict[str, dict[int, list[Row]]]
"""Rows by variant and seed, in order of steps."""


@dataclass(frozen=True)
class Aim:
    """A quantity to minimise. ``value`` takes it from a row, ``floor`` is its value for real images, and
    ``told`` describes a target. Variants are compared at the last ``targets`` of :func:`targets_of`."""

    value: Callable[[Row], float]
    floor: Callable[[Row], float]
    told: Callable[[float], str]
    targets: int


AIMS = (
    Aim(lambda row: math.inf if row["p50"] is None else row["p50"], lambda row: row["floor"],
        lambda target: f"distance {number(target)}", 3),
    Aim(lambda row: 1 - row["accuracy"], lambda row: 1 - row["real_accuracy"],
        lambda target: f"{1 - target:.1%} recognised", 1),
)  # fmt: skip
DISTANCE = AIMS[0]


def complete(rows: Sequence[Row]) -> list[Row]:
    """The rows of learners that completed their training."""
    ours = [row for row in rows if row["bench"] == "convergence"]
    ended = {row["digest"] for row in ours if row["step"] == row["of"]}
    return [row for row in ours if row["digest"] in ended]


def studies(rows: Sequence[Row], names: Sequence[str] | None = None) -> dict[str, Learners]:
    """The completed learners of every study (or of ``names``), with variants in the order of ``STUDIES``.

    Only seeds that all variants of a study have are included. If a variant and seed were trained again, the
    last one counts. Raises ``UserError`` if the remaining learners were not judged in the same way.
    """
    found: dict[str, dict[str, dict[int, dict[str, dict[int, Row]]]]] = {}
    for row in complete(rows):
        if names is not None and row["study"] not in names:
            continue
        runs = found.setdefault(row["study"], {}).setdefault(row["provider"], {}).setdefault(row["seed"], {})
        runs.setdefault(row["digest"], {})[row["step"]] = row
    return {study: _comparable(study, variants) for study, variants in found.items()}


def _comparable(study: str, variants: dict[str, dict[int, dict[str, dict[int, Row]]]]) -> Learners:
    shared = sorted(set.intersection(*(set(seeds) for seeds in variants.values())))
    if not shared:
        raise UserError(f"rows of the study {study!r}: no seed was trained in all its variants")
    places = {variant.name: i for i, variant in enumerate(STUDIES.get(study, ()))}
    learners = {
        name: {seed: list(list(seeds[seed].values())[-1].values()) for seed in shared}
        for name, seeds in sorted(variants.items(), key=lambda item: places.get(item[0], len(places)))
    }
    ways = {
        (
            tuple(row["step"] for row in of_seed),
            *(of_seed[0][key] for key in ("batch", "floor", "real_accuracy")),
            of_seed[0]["shape"]["samples"],
        )
        for seeds in learners.values()
        for of_seed in seeds.values()
    }
    # The earliest rows lack the learning rate.
    rates = {of_seed[0].get("lr") for seeds in learners.values() for of_seed in seeds.values()} - {None}
    if len(ways) > 1 or len(rates) > 1:
        raise UserError(
            f"rows of the study {study!r} have different steps, samples, batches, learning rates or judges"
        )
    return learners


def curves(seeds: dict[int, list[Row]], axis: str, aim: Aim = DISTANCE) -> list[Curve]:
    """One curve per seed."""
    return [
        Curve(tuple(row[axis] for row in of_seed), tuple(map(aim.value, of_seed)))
        for of_seed in seeds.values()
    ]


def table(study: str, learners: Learners) -> str:
    """Tables of what each variant reaches and how soon, with the origin of the rows."""
    base, *others = learners
    rows = [row for seeds in learners.values() for of_seed in seeds.values() for row in of_seed]
    seeds = len(learners[base])
    lines = [
        "| | parameters | ms a step | GFLOP an image | Fréchet distance at the end | recognised |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, of_seeds in learners.items():
        ends = [of_seed[-1] for of_seed in of_seeds.values()]
        ms = Band.of([1e3 * row["seconds"] / row["step"] for row in ends])
        cells = [
            name,
            f"{ends[0]['parameters'] / 1e6:.2f} M",
            _band(ms),
            number(ends[0]["flops"] / ends[0]["step"] / ends[0]["batch"] / 1e9),
            _band(Band.of(list(map(DISTANCE.value, ends))), infinite="diverged", least="lowest"),
            _band(Band.of([100 * row["accuracy"] for row in ends]), "%"),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        f"| to | | updates | seconds | TFLOP | sooner than {base}: updates | seconds | FLOPs |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for aim in AIMS:
        for target in targets(learners[base], aim)[-aim.targets :]:
            for name, of_seeds in learners.items():
                cells = [aim.told(target), name]
                for axis, scale in zip(AXES, (1, 1, 1e-12)):
                    places = [curve.crossing(target) * scale for curve in curves(of_seeds, axis, aim)]
                    cells.append(_band(Band.of(places)))
                cells += [""] * 3 if name == base else sooner(learners[base], of_seeds, aim, target)
                lines.append(f"| {' | '.join(cells)} |")
    lines += ["", _notes(learners, base, others, rows, seeds)]
    return "\n".join(lines)


def targets(seeds: dict[int, list[Row]], aim: Aim) -> list[float]:
    """The targets that ``seeds`` set, see :func:`targets_of`."""
    return targets_of(curves(seeds, "step", aim), aim.floor(next(iter(seeds.values()))[0]))


def sooner(base: dict[int, list[Row]], other: dict[int, list[Row]], aim: Aim, target: float) -> list[str]:
    """How many times sooner ``other`` reaches a target, by updates, seconds and FLOPs."""
    ratios = [speedup(curves(base, axis, aim), curves(other, axis, aim), target) for axis in AXES]
    return ["neither" if ratio is None else _ratio(ratio) for ratio in ratios]


def scales(found: dict[str, Learners]) -> str | None:
    """A table of how much sooner than DiT the variants reach DiT's last target, at each scale. None if there
    is only one scale."""
    lines, shapes = [], set()
    for learners in found.values():
        base, *others = learners
        if base != "DiT":
            continue
        for aim in AIMS:
            for target in targets(learners[base], aim)[-1:]:  # none if a seed of DiT diverged
                for name in others:
                    of_seeds = learners[name]
                    row, seeds = next(iter(of_seeds.values()))[-1], len(of_seeds)
                    shapes.add((row["shape"]["tokens"], row["of"]))
                    cells = [
                        str(row["shape"]["tokens"]), f"{row['of']:,}", str(seeds), aim.told(target), name,
                        *sooner(learners[base], of_seeds, aim, target),
                    ]  # fmt: skip
                    lines.append(f"| {' | '.join(cells)} |")
    if len(shapes) < 2:
        return None
    head = [
        "| tokens | updates | seeds | to | | sooner than DiT: updates | seconds | FLOPs |",
        "|---:|---:|---:|---|---|---:|---:|---:|",
    ]
    return "\n".join(head + lines)


def _any(learners: Learners) -> Row:
    return next(iter(next(iter(learners.values())).values()))[0]


def _notes(learners: Learners, base: str, others: Sequence[str], rows: Sequence[Row], seeds: int) -> str:
    same = [
        name for name in others
        if same_within_bands(curves(learners[base], "step"), curves(learners[name], "step"))
    ]  # fmt: skip
    row, commits = rows[0], ", ".join(dict.fromkeys(str(row["commit"]) for row in rows))
    run = *(str(row[key]) for key in ("device", "driver", "torch", "triton")), commits, str(row["command"])
    shape, likely = row["shape"], f"{coverage(seeds):.0%}"
    band = f"the median of {seeds} seeds (lowest-highest: {likely} likely to hold the median of all)"
    text = [
        f"Each number: {band if seeds > 1 else 'one seed, so no band'}. Batch {row['batch']}, "
        f"{row['dtype']}; {shape['samples']} samples in {shape['sampling']} steps without guidance. As many "
        f"real images that were learnt from have a distance of {number(row['floor'])} to those kept apart, "
        f"of which {row['real_accuracy']:.1%} are recognised.",
        origin(run),
    ]
    if same:
        text.insert(1, f"Bands touch {base}'s at every point: {', '.join(same)}.")
    return " ".join(text)


def _band(band: Band, unit: str = "", infinite: str = "not reached", least: str = "earliest") -> str:
    if math.isinf(band.median):
        return infinite if math.isinf(band.low) else f"{infinite} ({least} {number(band.low)})"
    high = infinite if math.isinf(band.high) else number(band.high)
    around = "" if band.low == band.high else f" ({number(band.low)}-{high})"
    return f"{number(band.median)}{unit}{around}"


def _ratio(band: Band) -> str:
    def one(value: float) -> str:
        if math.isnan(value):
            return "undecided"
        return "only here" if math.isinf(value) else "not" if value == 0 else f"{value:.2f}"

    around = "" if band.low == band.high else f" ({one(band.low)}-{one(band.high)})"
    return f"{one(band.median)}{'x' if 0 < band.median < math.inf else ''}{around}"


def draw(study: str, learners: Learners, samples: dict[str, np.ndarray], path: Path) -> None:
    """Draw distance over updates, seconds and FLOPs, with bands. Below are the ``samples`` of each variant,
    [points, n, C, S, S] in [-1, 1], after equal numbers of updates."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    height = 4.0 + (0.6 + 0.32 * len(samples) if samples else 0)
    figure = plt.figure(figsize=(14, height), layout="constrained")
    top, *below = figure.subfigures(2, 1, height_ratios=[4, height - 4]) if samples else [figure]
    axes = top.subplots(1, len(AXES), sharey=True)
    any_row = _any(learners)
    for panel, axis in zip(axes, AXES):
        for color, (name, seeds) in zip(COLORS, learners.items()):
            _curve(panel, curves(seeds, axis), name, color)
        panel.axhline(any_row["floor"], color="black", linewidth=0.8, linestyle=":")
        panel.set_xscale("log")
        panel.set_yscale("log")
        finish(panel, LABELS[axis])
        panel.tick_params(which="both", labelsize=7)  # minor labels help when less than a decade is shown
        panel.tick_params(axis="x", which="minor", labelrotation=45)
    axes[0].set_ylabel("Fréchet distance (dotted: of real images)", fontsize=8)
    axes[0].legend(fontsize=7, frameon=False)
    if below:
        steps = [row["step"] for row in next(iter(next(iter(learners.values())).values()))]
        _grids(below[0], samples, steps)
    save(figure, [any_row], path)


def _curve(panel: Any, found: Sequence[Curve], name: str, color: str) -> None:
    middle = [float(np.median([curve.places[i] for curve in found])) for i in range(len(found[0].places))]
    heights = np.array(columns(found))
    low, median, high = heights.min(1), np.median(heights, 1), heights.max(1)
    shown = np.isfinite(median)  # a curve ends where most seeds have diverged
    panel.plot(middle, np.where(shown, median, np.nan), "-o", color=color, label=name, markersize=3)
    panel.fill_between(middle, low, high, where=np.isfinite(high), color=color, alpha=0.2, linewidth=0)


def _grids(figure: Any, samples: dict[str, np.ndarray], steps: Sequence[int]) -> None:
    """Draw a row of pictures for each variant and a column for each step shown."""
    chosen = np.unique(np.linspace(0, len(steps) - 1, GRID_STEPS + 1).round().astype(int))[-GRID_STEPS:]
    axes = figure.subplots(len(samples), len(chosen), squeeze=False)
    for i, (row, (name, points)) in enumerate(zip(axes, samples.items())):
        for axis, point in zip(row, chosen):
            strip = np.concatenate(list((points[point].clip(-1, 1) + 1) / 2), axis=-1)  # [C, S, n S]
            axis.imshow(
                strip.transpose(1, 2, 0).squeeze(), cmap="gray", vmin=0, vmax=1, interpolation="nearest"
            )
            axis.set_xticks([])
            axis.set_yticks([])
            axis.spines[:].set_visible(False)
            if axis is row[0]:
                axis.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
            if i == 0:
                axis.set_title(f"{steps[point]} updates", fontsize=8)
