"""What a run records: ``metrics.jsonl``, one row per interval, and ``loss.png`` made from it.

Steps are kept on the device and read once per interval. A row averages all steps since the row before it.
Rows are written at every ``log_every`` and every ``save_every`` steps and at the end. A run that is stopped
between them puts its pending steps into the checkpoint, so resuming it writes the rows of the unbroken run.
"""

import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError
from ..files import aside

QUARTILES = 4
TIMESTEPS, GRAD_NORM = "t", "grad_norm"


class NonFiniteLossError(UserError):
    """A loss or a gradient became NaN or infinite."""


class Metrics:
    """Collects steps and appends rows. Opening at ``step`` drops rows of later steps (of a killed run)."""

    def __init__(self, path: Path, *, step: int, num_timesteps: int, batch_size: int):
        self.path, self.num_timesteps, self.batch_size = path, num_timesteps, batch_size
        self._terms: list[dict[str, Tensor]] = []
        self._timesteps: list[Tensor] = []
        self._grad_norms: list[Tensor] = []
        self._restored = 0
        self._began = time.perf_counter()
        if path.exists():
            _keep_rows(path, step)

    def add(self, terms: dict[str, Tensor], t: Tensor, grad_norm: Tensor) -> None:
        """One step: loss terms [B] by name, timesteps [B], and the gradient norm before clipping."""
        self._terms.append({name: values.detach().float() for name, values in terms.items()})
        self._timesteps.append(t)
        self._grad_norms.append(grad_norm)

    def restart_clock(self) -> None:
        """Leave what happened since the last row out of ``img_per_s``."""
        self._began = time.perf_counter()

    def row(self, step: int, lr: float) -> dict[str, Any]:
        """Average the steps since the last row, append the row of ``step`` to the file and return it.

        Each loss term also comes by quarter of the timesteps, ``_q0`` (least noise) to ``_q3``, where there
        were samples. Raises ``NonFiniteLossError``, naming the first bad step, before anything is written.
        """
        terms = self.pending(step)
        if not terms:
            return {}
        timesteps, grad_norms = terms.pop(TIMESTEPS), terms.pop(GRAD_NORM)
        row: dict[str, Any] = {"step": step}
        row.update((name, float(terms[name].mean())) for name in sorted(terms, key=_loss_first))
        quartile = timesteps * QUARTILES // self.num_timesteps
        for name, term in terms.items():
            for q in range(QUARTILES):
                if (quartile == q).any():
                    row[f"{name}_q{q}"] = float(term[quartile == q].mean())
        seconds = time.perf_counter() - self._began
        images = (len(self._terms) - self._restored) * self.batch_size
        row.update(grad_norm=float(grad_norms.mean()), lr=lr, img_per_s=images / seconds)
        row["time"] = round(time.time(), 3)
        with open(self.path, "a") as file:
            file.write(json.dumps(row) + "\n")
        self._terms, self._timesteps, self._grad_norms, self._restored = [], [], [], 0
        self.restart_clock()
        return row

    def pending(self, step: int) -> dict[str, Tensor]:
        """The steps since the last row up to ``step``, on the CPU: [n, B] by loss term, ``t`` [n, B],
        ``grad_norm`` [n]; empty if there are none. Raises ``NonFiniteLossError`` as ``row`` does."""
        count = len(self._terms)
        if count == 0:
            return {}
        names = list(self._terms[-1])  # restored ones may come in another order
        pending = {name: torch.stack([t[name] for t in self._terms]).cpu() for name in names}
        pending[GRAD_NORM] = torch.stack(self._grad_norms).float().cpu()
        for i in range(count):
            for name, values in pending.items():
                if not math.isfinite(value := float(values[i].mean())):
                    raise NonFiniteLossError(f"{name} is {value} at step {step - count + i + 1}")
        return {**pending, TIMESTEPS: torch.stack(self._timesteps).cpu()}

    def restore(self, pending: dict[str, Tensor], device: torch.device) -> None:
        """Go on from what ``pending`` returned in the run that was stopped."""
        steps = {name: values.to(device).unbind() for name, values in pending.items()}
        self._timesteps = list(steps.pop(TIMESTEPS))
        self._grad_norms = list(steps.pop(GRAD_NORM))
        self._restored = len(self._timesteps)
        self._terms = [{name: values[i] for name, values in steps.items()} for i in range(self._restored)]


def _loss_first(name: str) -> tuple[bool, bool]:
    return name.startswith("m_"), not name.endswith("loss")


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a ``metrics.jsonl``; what is none (a line torn by a kill, or edited) is left out."""
    rows = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict) and type(row.get("step")) is int:
            rows.append(row)
    return rows


def _keep_rows(path: Path, step: int) -> None:
    kept = [json.dumps(row) + "\n" for row in read_rows(path) if row["step"] <= step]
    with aside(path) as file:
        file.write_text("".join(kept))


def plot_losses(metrics: Path, picture: Path) -> None:
    """The loss curve of ``metrics.jsonl`` as a PNG. ``UserError`` if matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import LogLocator, ScalarFormatter
    except ImportError as error:
        raise UserError(f"the loss curve needs matplotlib ({error}); pip install 'mdt-fast[train]'") from None
    rows = read_rows(metrics)
    if not rows:
        return
    labels = {"loss": "all tokens", "m_loss": "masked"}
    figure = Figure(figsize=(7, 4), dpi=120, layout="constrained")
    axes = figure.subplots()
    for color, (name, label) in zip(("tab:blue", "tab:orange"), labels.items()):
        steps = [row["step"] for row in rows if isinstance(row.get(name), float)]
        if steps:
            values = [row[name] for row in rows if isinstance(row.get(name), float)]
            axes.plot(steps, values, color=color, alpha=0.25, linewidth=0.8)
            axes.plot(steps, _smooth(values), color=color, label=label)
    axes.set(xlabel="step", ylabel="loss per image (log scale)", yscale="log", title="Training loss")
    axes.yaxis.set(
        major_locator=LogLocator(subs=(1, 2, 5)),
        major_formatter=ScalarFormatter(),
        minor_locator=LogLocator(subs="all"),
    )
    axes.yaxis.set_minor_formatter("")
    axes.grid(alpha=0.3)
    axes.legend()
    with aside(picture) as file:
        figure.savefig(file, format="png")


def _smooth(values: list[float]) -> np.ndarray:
    """Geometric means over a centred window of about a twelfth of the run, shorter at both ends."""
    logs = np.log(values)
    reach = [min(len(logs) // 24, i, len(logs) - 1 - i) for i in range(len(logs))]
    return np.exp([logs[i - r : i + r + 1].mean() for i, r in enumerate(reach)])
