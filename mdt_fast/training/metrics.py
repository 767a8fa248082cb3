"""A run's metrics: ``metrics.jsonl``, one row per interval, and ``loss.png`` made from it.

Step values stay on the device and are read once per interval. A row averages all steps since the previous
row. Rows are written every ``log_every`` and every ``save_every`` steps and at the end. A run stopped between
two rows saves its pending steps in the checkpoint, so after a resume the rows are those of an uninterrupted
run. With several processes each collects its own rows of the batch; they are gathered when they are read.
"""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError
from ..files import aside
from .distributed import World

QUARTILES = 4
TIMESTEPS, GRAD_NORM = "t", "grad_norm"


def img_per_s(images: int, seconds: float) -> dict[str, float]:
    return {"img_per_s": images / seconds}


class NonFiniteLossError(UserError):
    """Losses or gradients were NaN or infinite for too many steps in a row, from ``step`` on."""

    def __init__(self, message: str, step: int):
        super().__init__(message)
        self.step = step


class Metrics:
    """Collects steps and appends rows. Opening at ``step`` drops rows of later steps (of a killed run).

    ``max_skips``: after more than this many bad steps in a row (with a non-finite loss or gradient, which the
    optimiser skips) the next read raises ``NonFiniteLossError``. ``speed``: returns a row's speed columns for
    a number of images and seconds.
    """

    def __init__(
        self,
        path: Path,
        *,
        step: int,
        num_timesteps: int,
        batch_size: int,
        max_skips: int = 10,
        world: World | None = None,
        speed: Callable[[int, float], dict[str, float]] = img_per_s,
    ):
        self.path, self.num_timesteps, self.batch_size = path, num_timesteps, batch_size
        self.max_skips, self.world, self.speed = max_skips, world or World(), speed
        self._terms: list[dict[str, Tensor]] = []
        self._timesteps: list[Tensor] = []
        self._grad_norms: list[Tensor] = []
        self._before: dict[str, Tensor] = {}
        self.streak = self.skipped = 0  # bad steps before the pending ones: in a row, and in all
        self.bad = 0  # in a row up to the last pending one that was read
        self._began = time.perf_counter()
        if self.world.main and path.exists():
            _keep_rows(path, step)

    def add(self, terms: dict[str, Tensor], t: Tensor, grad_norm: Tensor) -> None:
        """Add one step: loss terms [b] by name, timesteps [b], and the gradient norm before clipping."""
        self._terms.append({name: values.detach().float() for name, values in terms.items()})
        self._timesteps.append(t)
        self._grad_norms.append(grad_norm)

    def restart_clock(self) -> None:
        """Exclude the time since the last row from the measured time."""
        self._began = time.perf_counter()

    def row(self, step: int, lr: float) -> dict[str, Any]:
        """Average the steps since the last row, append the row of ``step`` to the file and return it.

        Each loss term is also given per quarter of the timesteps, ``_q0`` (least noise) to ``_q3``, where
        there were samples; ``skipped`` counts the run's bad steps, which no average includes. Raises
        ``NonFiniteLossError``, naming the first bad step, before anything is written.
        """
        fresh = len(self._terms)
        terms = dict(self.pending(step))
        if not terms:
            return {}
        good = _finite(terms)
        self.streak = self._streaks(terms)[-1]
        timesteps, grad_norms = terms.pop(TIMESTEPS)[good], terms.pop(GRAD_NORM)[good]
        row: dict[str, Any] = {"step": step}
        if good.any():
            row.update((name, float(terms[name][good].mean())) for name in sorted(terms, key=_loss_first))
            quartile = timesteps * QUARTILES // self.num_timesteps
            for name, term in terms.items():
                for q in range(QUARTILES):
                    if (quartile == q).any():
                        row[f"{name}_q{q}"] = float(term[good][quartile == q].mean())
            row["grad_norm"] = float(grad_norms.mean())
        self.skipped += int((~good).sum())
        if self.skipped:
            row["skipped"] = self.skipped
        seconds = time.perf_counter() - self._began
        row.update(lr=lr, **self.speed(fresh * self.batch_size, seconds), time=round(time.time(), 3))
        self._terms, self._timesteps, self._grad_norms, self._before = [], [], [], {}
        if self.world.main:
            try:
                with open(self.path, "a") as file:
                    file.write(json.dumps(row) + "\n")
            except OSError as error:
                raise UserError(f"{self.path}: cannot be written: {error.strerror}") from error
        self.restart_clock()
        return row

    def pending(self, step: int) -> dict[str, Tensor]:
        """The steps since the last row up to ``step``, on the CPU: [n, B] by loss term, ``t`` [n, B],
        ``grad_norm`` [n]; empty if there are none. All processes must call this, and get values for the whole
        batch. Raises ``NonFiniteLossError`` as ``row`` does."""
        if self._terms:
            names = list(self._terms[0])
            own = [torch.stack([terms[name] for terms in self._terms]) for name in names]
            own.append(torch.stack(self._timesteps).to(own[0]))  # float32 holds every timestep exactly
            parts = self.world.all_gather(torch.stack(own).cpu())
            values = torch.cat(parts, dim=2)  # ranks hold consecutive rows of the batch
            pending = {name: values[i] for i, name in enumerate(names)}
            pending[TIMESTEPS] = values[-1].long()
            pending[GRAD_NORM] = torch.stack(self._grad_norms).float().cpu()
            if self._before:
                pending = {name: torch.cat([self._before[name], values]) for name, values in pending.items()}
        else:
            pending = self._before
        self.bad = self.streak
        if pending:
            self._check(pending, step)
            self.bad = self._streaks(pending)[-1]
        return pending

    def restore(self, pending: dict[str, Tensor], streak: int, skipped: int) -> None:
        """Restore ``pending``, ``streak`` and ``skipped`` of the stopped run."""
        self._before, self.streak, self.skipped = pending, streak, skipped

    def _streaks(self, pending: dict[str, Tensor]) -> list[int]:
        """For each step, the number of consecutive bad steps ending with it."""
        streaks, streak = [], self.streak
        for good in _finite(pending).tolist():
            streak = 0 if good else streak + 1
            streaks.append(streak)
        return streaks

    def _check(self, pending: dict[str, Tensor], step: int) -> None:
        streaks = self._streaks(pending)
        if max(streaks) <= self.max_skips:
            return
        last = next(i for i, streak in enumerate(streaks) if streak > self.max_skips)
        first = last - streaks[last] + 1  # negative: before these steps, so only its count is known
        name, value = next(
            (name, float(values[max(first, 0)].mean()))
            for name, values in pending.items()
            if name != TIMESTEPS and not values[max(first, 0)].isfinite().all()
        )
        more = f", and so are the {streaks[last] - 1} steps after it" if streaks[last] > 1 else ""
        bad = step - len(streaks) + first + 1
        raise NonFiniteLossError(
            f"{name} is {value} at step {bad}{more} (train.max_skips={self.max_skips})", bad
        )


def _finite(pending: dict[str, Tensor]) -> Tensor:
    """Bool [n]: whether all values of each step are finite."""
    return torch.stack(
        [
            values.flatten(1).isfinite().all(1) if values.ndim > 1 else values.isfinite()
            for name, values in pending.items()
            if name != TIMESTEPS
        ]
    ).all(0)


def _loss_first(name: str) -> tuple[bool, bool]:
    return name.startswith("m_"), not name.endswith("loss")


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a ``metrics.jsonl``; invalid lines (torn by a kill, or edited) are skipped."""
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
    """Plot the loss curve of ``metrics.jsonl`` as a PNG. ``UserError`` if matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import LogLocator, ScalarFormatter
    except ImportError as error:
        raise UserError(f"the loss curve needs matplotlib ({error}); pip install 'mdt-fast[train]'") from None
    rows = read_rows(metrics)
    if not any(isinstance(row.get("loss"), float) for row in rows):
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
