"""Draw two more pictures of ops from rows: a roofline plot, and attention's rate over head sizes."""

from collections.abc import Sequence
from pathlib import Path

from plots import ATTENTION_COLORS, OP_COLORS, finish, op_rows, panels_of, save, tiles
from rows import Row


def draw(rows: Sequence[Row], path: Path) -> bool:
    """Draw a roofline plot with a panel for each dtype: FLOP/s over FLOP per byte for every op that has both,
    and the rates that a copy and a matmul reached in these rows. Returns False if there are no such ops."""
    panels: dict[str, dict[tuple[str, ...], dict[str, float]]] = {}
    for row in op_rows(rows, "kernels"):
        if row["metric"] in ("gb_per_s", "tflop_per_s"):
            key = (row["op"], row["mode"], str(row["shape"]), row["provider"])
            panels.setdefault(row["dtype"], {}).setdefault(key, {})[row["metric"]] = row["p50"]
    panels = {
        dtype: both
        for dtype, by in panels.items()
        if (both := {key: rates for key, rates in by.items() if len(rates) == 2})
    }
    if not panels:
        return False
    measured = [row for row in rows if row["bench"] == "kernels" and row["p50"] is not None]
    copy = max((row["p50"] for row in measured if row["op"] == "copy"), default=None)
    figure, axes = panels_of(1, len(panels), (1 + 5.5 * len(panels), 4.5))
    for axis, (dtype, by) in zip(axes[0], panels.items()):
        intensities = []
        for provider in OP_COLORS:
            dots = [
                (1e3 * rates["tflop_per_s"] / rates["gb_per_s"], rates["tflop_per_s"], key)
                for key, rates in by.items()
                if key[3] == provider
            ]
            if not dots:
                continue
            x, y = [one[0] for one in dots], [one[1] for one in dots]
            intensities += x
            axis.scatter(x, y, s=18, color=OP_COLORS[provider], label=provider)
            if provider == "fast":
                for intensity, reached, (op, mode, *_) in dots:
                    axis.annotate(f" {op} {mode}", (intensity, reached), fontsize=5)
        matmul = max(
            (row["p50"] for row in measured if row["op"] == "matmul" and row["dtype"] == dtype), default=None
        )
        ends = [min(intensities) / 2, max(intensities) * 2]
        if copy is not None:
            axis.plot(ends, [1e-3 * copy * end for end in ends], color="black", linewidth=0.8)
        if matmul is not None:
            axis.axhline(matmul, color="black", linewidth=0.8)
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_title(f"{dtype} · lines: a copy, a matmul", loc="left", fontsize=9)
        axis.set_ylabel("TFLOP/s", fontsize=8)
        axis.legend(fontsize=6, frameon=False)
        finish(axis, "FLOP per byte that has to move")
    save(figure, rows, path)
    return True


def draw_head_sizes(rows: Sequence[Row], path: Path) -> bool:
    """Draw attention's TFLOP/s over head sizes, without masks. There is a line for each provider and a panel
    for each mode, length and dtype. Returns False if no length was measured at two head sizes."""
    panels: dict[tuple[str, ...], dict[str, dict[int, float]]] = {}
    for row in op_rows(rows, "attention"):
        if row["metric"] == "tflop_per_s" and "K" not in row["shape"]:
            panel = (row["mode"], f"{row['shape']['L']} tokens", row["dtype"])
            by_size = panels.setdefault(panel, {}).setdefault(row["provider"], {})
            by_size[row["shape"]["d"]] = row["p50"]
    panels = {
        panel: by for panel, by in panels.items() if len({d for sizes in by.values() for d in sizes}) > 1
    }
    if not panels:
        return False
    figure, axes = tiles(len(panels))
    for axis, (panel, by) in zip(axes, panels.items()):
        for provider in (name for name in ATTENTION_COLORS if name in by):
            dots = sorted(by[provider].items())
            axis.plot(*zip(*dots), "-o", color=ATTENTION_COLORS[provider], markersize=3, label=provider)
        axis.set_xticks(sorted({d for sizes in by.values() for d in sizes}))
        axis.set_title(" · ".join(panel), loc="left", fontsize=9)
        axis.set_ylim(bottom=0)
        axis.set_ylabel("TFLOP/s", fontsize=8)
        finish(axis, "head size")
    axes[0].legend(fontsize=6, frameon=False)
    save(figure, rows, path)
    return True
