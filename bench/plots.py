"""The picture of a run: img/s and peak memory by provider, one panel pair per case. Made from rows."""

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from formats import memory, memory_unit, number
from mdt_fast.errors import UserError
from rows import Row

COLORS = {
    "reference": "#9a9a9a",
    "reference-compiled": "#6b6b6b",
    "fast": "#3b82c4",
    "fast-compiled": "#1d4f8c",
    "official": "#d08a3c",
}


def check_target(path: Path) -> None:
    """``UserError`` if a picture could not be written to ``path``; asked before anything is measured."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("--plot: needs matplotlib, which is not installed: pip install matplotlib")
    if path.suffix.lower() != ".png":
        raise UserError(f"--plot: got {str(path)!r}, allowed is a file that ends in .png")
    existed = path.exists()
    try:
        with path.open("ab"):
            pass
    except OSError as error:
        raise UserError(f"--plot: cannot write {str(path)!r}: {error.strerror}") from None
    if not existed:
        path.unlink()


def draw(rows: Sequence[Row], path: Path) -> bool:
    """Draw all throughput rows that were measured into a PNG; False, and no file, if there are none."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cases = group(rows)
    if not cases:
        return False
    size = (10, 0.4 + 2.3 * len(cases))
    figure, axes = plt.subplots(len(cases), 2, figsize=size, squeeze=False, layout="constrained")
    for (left, right), ((mode, model, batch, dtype), metrics) in zip(axes, cases.items()):
        unit = "img/s" if mode == "train" else "img/s, 250 guided steps (extrapolated)"
        _bars(left, metrics["img_per_s"], unit, number)
        sizes = metrics.get("peak_bytes", {})
        unit, scale = memory_unit(max((row["p50"] for row in sizes.values()), default=0))
        _bars(right, sizes, f"peak memory, {unit}", memory, scale)
        left.set_title(f"{mode} · {model} · batch {batch} · {dtype}", loc="left", fontsize=10)
    any_row = rows[0]
    figure.suptitle(
        f"{any_row['device']} · torch {any_row['torch']} · commit {any_row['commit']}", fontsize=9
    )
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return True


Case = tuple[str, str, int, str]


def group(rows: Sequence[Row]) -> dict[Case, dict[str, dict[str, Row]]]:
    """Rows of measured cases by (mode, model, batch, dtype), metric and provider."""
    cases: dict[Case, dict[str, dict[str, Row]]] = {}
    for row in rows:
        if row["bench"] == "throughput" and "model" in row and row["p50"] is not None:
            case = (row["mode"], row["model"], row["batch"], row["dtype"])
            cases.setdefault(case, {}).setdefault(row["metric"], {})[row["provider"]] = row
    return {case: metrics for case, metrics in cases.items() if "img_per_s" in metrics}


def _bars(
    axis: Any, by_provider: dict[str, Row], label: str, text: Callable[[float], str], scale: float = 1.0
) -> None:
    names = [name for name in COLORS if name in by_provider]
    values = [by_provider[name]["p50"] / scale for name in names]
    places = range(len(names))
    axis.barh(places, values, color=[COLORS[name] for name in names], height=0.65)
    for place, name, value in zip(places, names, values):
        low, high = by_provider[name]["p20"], by_provider[name]["p80"]
        if low is not None:
            axis.plot([low / scale, high / scale], [place, place], color="black", linewidth=1.2)
        axis.annotate(
            f" {text(value * scale)}", (max(value, (high or 0) / scale), place), va="center", fontsize=8
        )
    axis.set_yticks(places, names, fontsize=8)
    axis.invert_yaxis()
    axis.set_xlabel(label, fontsize=8)
    axis.tick_params(axis="x", labelsize=8)
    axis.set_xlim(0, max(values, default=1.0) * 1.18)
    axis.spines[["top", "right"]].set_visible(False)
