"""Draw pictures of a run from its rows: img/s and peak memory of models, the share of the roof that ops
reach, and TFLOP/s of attention over lengths."""

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from formats import memory, memory_unit, number, sizes
from mdt_fast.errors import UserError
from rows import Row, mode_of

COLORS = {
    "reference": "#9a9a9a",
    "reference-compiled": "#6b6b6b",
    "reference-blocks-compiled": "#505050",
    "fast": "#3b82c4",
    "fast-compiled": "#1d4f8c",
    "fast-blocks-compiled": "#5a7db0",
    "fast-graphs": "#2e7d4f",
    "fast-in-turn": "#00a0a0",
    "fast-in-turn-compiled": "#007878",
    "fast-in-turn-graphs": "#66b388",
    "fast-lean": "#a04c9a",
    "fast-lean-compiled": "#7a3a76",
    "fast-lean-graphs": "#c77fc2",
    "fast-lean-in-turn": "#b06a86",
    "fast-lean-in-turn-graphs": "#d9a3b8",
    "fast-float8": "#c9a227",
    "fast-float8-blocks-compiled": "#a07f14",
    "fast-float8-graphs": "#e0c25a",
    "fast-lean-float8": "#8f8a2a",
    "fast-lean-float8-graphs": "#bdb76b",
    "fast-float8-torchao": "#b07050",
    "fast-float8-torchao-blocks-compiled": "#8c5438",
    "fast-float8-torchao-graphs": "#d29a7c",
    "official": "#d08a3c",
    "diffusers": "#8a6fb0",
}
RATES = ("copy", "matmul")
"""Ops measured only for the machine's own rates."""
OP_COLORS = {"fast": "#3b82c4", "eager": "#9a9a9a", "compile": "#6b6b6b"}
ATTENTION_COLORS = {
    "sdpa-no-bias": "#000000",
    "sdpa": "#9a9a9a",
    "flex": "#d08a3c",
    "xformers": "#8a6fb0",
    "flash_attn": "#b0506f",
    "triton-lookup-recompute": "#1d4f8c",
    "triton-lookup-store": "#3b82c4",
    "triton-dense-recompute": "#2e7d4f",
    "triton-dense-store": "#66b388",
    "triton-packed": "#00a0a0",
}


def check_target(path: Path, option: str = "--plot") -> None:
    """Raise ``UserError`` if a picture cannot be written to ``path``; called before anything is measured."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError(f"{option}: needs matplotlib, which is not installed: pip install matplotlib")
    if path.suffix.lower() != ".png":
        raise UserError(f"{option}: got {str(path)!r}, expected a file that ends in .png")
    existed = path.exists()
    try:
        with path.open("ab"):
            pass
    except OSError as error:
        raise UserError(f"{option}: cannot write {str(path)!r}: {error.strerror}") from None
    if not existed:
        path.unlink()


def draw(rows: Sequence[Row], path: Path) -> bool:
    """Draw all measured throughput rows as a PNG. Returns False, without a file, if there are none."""
    cases = group(rows)
    if not cases:
        return False
    figure, axes = panels_of(len(cases), 2, (10, 0.4 + 2.3 * len(cases)))
    for (left, right), ((mode, model, batch, dtype), metrics) in zip(axes, cases.items()):
        unit = "img/s" if mode == "train" else "img/s, 250 guided steps (extrapolated)"
        _bars(left, metrics["img_per_s"], unit, number)
        sizes = metrics.get("peak_bytes", {})
        unit, scale = memory_unit(max((row["p50"] for row in sizes.values()), default=0))
        _bars(right, sizes, f"peak memory, {unit}", memory, scale)
        left.set_title(f"{mode} · {model} · batch {batch} · {dtype}", loc="left", fontsize=10)
    save(figure, rows, path)
    return True


def draw_batches(rows: Sequence[Row], path: Path) -> bool:
    """Draw img/s over batch size, with a line for each provider and a panel for each mode, model and dtype
    measured at several batch sizes. Returns False if there are none."""
    panels: dict[tuple[str, str, str], dict[str, dict[int, float]]] = {}
    for (mode, model, batch, dtype), metrics in group(rows).items():
        for provider, row in metrics["img_per_s"].items():
            if provider in COLORS:
                panels.setdefault((mode, model, dtype), {}).setdefault(provider, {})[batch] = row["p50"]
    panels = {key: lines for key, lines in panels.items() if max(map(len, lines.values())) > 1}
    best = {key: max(max(line.values()) for line in lines.values()) for key, lines in panels.items()}
    panels = {key: panels[key] for key in sorted(panels, key=lambda key: (key[0] != "train", -best[key]))}
    if not panels:
        return False
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    figure, axes = tiles(len(panels))
    for axis, (panel, lines) in zip(axes, panels.items()):
        for provider in (name for name in COLORS if name in lines):
            batches, rates = zip(*sorted(lines[provider].items()))
            axis.plot(batches, rates, "-o", color=COLORS[provider], markersize=3, label=provider)
        ticks = sorted({batch for line in lines.values() for batch in line})
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xticks(ticks, [str(tick) for tick in ticks])
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(FuncFormatter(lambda rate, _: f"{rate:g}"))
        axis.yaxis.set_minor_formatter(NullFormatter())
        axis.tick_params(axis="y", labelsize=8)
        axis.set_title(" · ".join(panel), loc="left", fontsize=9)
        axis.set_ylabel("img/s", fontsize=8)
        finish(axis, "batch" if panel[0] == "train" else "batch (250 guided steps, extrapolated)")
    fullest, _ = max(zip(axes, panels.values()), key=lambda pair: len(pair[1]))
    fullest.legend(fontsize=6, frameon=False)
    save(figure, rows, path)
    return True


def draw_kernels(rows: Sequence[Row], path: Path) -> bool:
    """Draw the share of the roof that each op reaches, with a panel for each mode and dtype. Returns False if
    there are no such rows."""
    panels: dict[tuple[str, str], dict[str, dict[str, Row]]] = {}
    for row in op_rows(rows, "kernels"):
        if row["metric"] == "roof_share":
            ops = panels.setdefault((row["mode"], row["dtype"]), {})
            ops.setdefault(f"{row['op']}\n{sizes(row['shape'])}", {})[row["provider"]] = row
    if not panels:
        return False
    height = 0.8 + 0.55 * max(map(len, panels.values()))
    figure, axes = panels_of(1, len(panels), (1.5 + 5.5 * len(panels), height))
    for axis, ((mode, dtype), ops) in zip(axes[0], panels.items()):
        for i, provider in enumerate(OP_COLORS):
            found = [(place, by[provider]) for place, by in enumerate(ops.values()) if provider in by]
            if not found:
                continue
            places = [place + 0.25 * (i - 1) for place, _ in found]
            values = [100 * row["p50"] for _, row in found]
            axis.barh(places, values, height=0.23, color=OP_COLORS[provider], label=provider)
        axis.set_yticks(range(len(ops)), list(ops), fontsize=7)
        axis.invert_yaxis()
        axis.axvline(100, color="black", linewidth=0.8)
        axis.set_title(f"{mode} · {dtype}", loc="left", fontsize=10)
        finish(axis, "% of the roof (a copy of as many bytes; matmul peak)")
    axes[0][0].legend(fontsize=7, frameon=False)
    save(figure, rows, path)
    return True


def draw_attention(rows: Sequence[Row], path: Path) -> bool:
    """Draw TFLOP/s over lengths, with a line for each provider and a panel for each mode, heads and dtype.
    Masked cases are rings. Returns False if there are no such rows."""
    panels: dict[tuple[str, ...], dict[str, list[Row]]] = {}
    for row in op_rows(rows, "attention"):
        if row["metric"] == "tflop_per_s":
            heads = f"{row['shape']['H']} heads of {row['shape']['d']}"
            by_provider = panels.setdefault((row["mode"], heads, row["dtype"]), {})
            by_provider.setdefault(row["provider"], []).append(row)
    if not panels:
        return False
    figure, axes = tiles(len(panels))
    for axis, (panel, by_provider) in zip(axes, panels.items()):
        for provider in (name for name in ATTENTION_COLORS if name in by_provider):
            color = ATTENTION_COLORS[provider]
            for masked, style in ((False, "-o"), (True, "o")):
                dots = sorted(
                    (row["shape"]["L"], row["p50"])
                    for row in by_provider[provider]
                    if masked == ("K" in row["shape"])
                )
                axis.plot(
                    [length for length, _ in dots],
                    [rate for _, rate in dots],
                    style,
                    color=color,
                    markersize=5 if masked else 3,
                    markerfacecolor="none" if masked else color,
                    label=None if masked else provider,
                )
        axis.set_xscale("log", base=2)
        ticks = sorted({row["shape"]["L"] for found in by_provider.values() for row in found})
        axis.set_xticks(ticks, [str(tick) for tick in ticks])
        axis.set_title(" · ".join(panel), loc="left", fontsize=9)
        axis.set_ylim(bottom=0)
        axis.set_ylabel("TFLOP/s", fontsize=8)
        finish(axis, "tokens (rings: of which 60% are kept)")
    fullest, _ = max(zip(axes, panels.values()), key=lambda pair: len(pair[1]))
    fullest.legend(fontsize=6, frameon=False)
    save(figure, rows, path)
    return True


def op_rows(rows: Sequence[Row], bench: str) -> list[Row]:
    """The measured rows of ``kernels`` or ``attention``, without those for the machine's own rates."""
    return [
        row for row in rows if row["bench"] == bench and row["p50"] is not None and row["op"] not in RATES
    ]


def panels_of(height: int, width: int, size: tuple[float, float]) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt.subplots(height, width, figsize=size, squeeze=False, layout="constrained")


def tiles(count: int) -> tuple[Any, Any]:
    """A figure of ``count`` small panels, up to four in a row, and their axes."""
    columns = min(4, count)
    height = -(-count // columns)
    figure, axes = panels_of(height, columns, (1 + 3.6 * columns, 0.6 + 3.2 * height))
    for axis in axes.flat[count:]:
        axis.set_visible(False)
    return figure, axes.flat[:count]


def finish(axis: Any, label: str) -> None:
    axis.set_xlabel(label, fontsize=8)
    axis.tick_params(axis="x", labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)


def save(figure: Any, rows: Sequence[Row], path: Path) -> None:
    import matplotlib.pyplot as plt

    any_row, commits = rows[0], list(dict.fromkeys(str(row["commit"]) for row in rows))
    said = f"commit {commits[0]}" if len(commits) == 1 else f"commits {commits[0]} to {commits[-1]}"
    figure.suptitle(f"{any_row['device']} · torch {any_row['torch']} · {said}", fontsize=9)
    figure.savefig(path, dpi=150)
    plt.close(figure)


Case = tuple[str, str, int, str]


def group(rows: Sequence[Row]) -> dict[Case, dict[str, dict[str, Row]]]:
    """Rows of measured cases by (mode, model, batch, dtype), metric and provider."""
    cases: dict[Case, dict[str, dict[str, Row]]] = {}
    for row in rows:
        if row["bench"] == "throughput" and "model" in row and row["p50"] is not None:
            case = (mode_of(row), row["model"], row["batch"], row["dtype"])
            cases.setdefault(case, {}).setdefault(row["metric"], {})[row["provider"]] = row
    return {case: metrics for case, metrics in cases.items() if "img_per_s" in metrics}


def _bars(
    axis: Any, by_provider: dict[str, Row], label: str, text: Callable[[float], str], scale: float = 1.0
) -> None:
    # With flipped switches, e.g. `fast with stored_scores`, use the provider's colour.
    colors = {name: COLORS[base] for base in COLORS for name in by_provider if name.split(" ")[0] == base}
    names = list(colors)
    values = [by_provider[name]["p50"] / scale for name in names]
    places = range(len(names))
    axis.barh(places, values, color=list(colors.values()), height=0.65)
    for place, name, value in zip(places, names, values):
        low, high = by_provider[name]["p20"], by_provider[name]["p80"]
        if low is not None:
            axis.plot([low / scale, high / scale], [place, place], color="black", linewidth=1.2)
        axis.annotate(
            f" {text(value * scale)}", (max(value, (high or 0) / scale), place), va="center", fontsize=8
        )
    axis.set_yticks(places, names, fontsize=8)
    axis.invert_yaxis()
    axis.set_xlim(0, max(values, default=1.0) * 1.18)
    finish(axis, label)
