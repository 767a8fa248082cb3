"""Destinations of metrics and pictures besides the run's folder: TensorBoard and Weights & Biases.

Both are optional, and neither can end a training run: :class:`Sinks` drops one that fails. Only the process
that writes ``metrics.jsonl`` (rank 0) opens any.
"""

import math
import re
import secrets
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from ..config import RunConfig, to_dict
from ..errors import UserError
from ..files import aside, resolved

LOSS = re.compile(r"(m_)?((?:loss|mse|vb)(?:_q\d)?)")
SPEED = ("img_per_s", "tflop_per_s", "share_of_peak", "memory_gib")
TENSORBOARD_FOLDER, WANDB_ID = "tensorboard", "wandb_id"


class Sink(Protocol):
    """Receives a run's metrics and pictures. Any method may raise any exception."""

    name: str

    def write(self, row: dict[str, Any]) -> None:
        """Write a row of metrics, as ``Metrics.row`` returns it."""

    def picture(self, name: str, path: Path, step: int) -> None:
        """Add the image file ``path``, made after ``step`` updates, to the series ``name``."""

    def close(self) -> None:
        """Flush what is still buffered."""


def open_sinks(
    out: Path, config: RunConfig, step: int, *, tensorboard: bool | None = None, wandb: str | None = None
) -> list[Sink]:
    """Open the sinks of the run in ``out``, which has done ``step`` updates (0: a new run).

    ``tensorboard``: None uses it if installed. ``wandb``: the project, or None for none. Raises ``UserError``
    if a requested sink is not installed or cannot start.
    """
    sinks: list[Sink] = []
    if tensorboard is not False:
        try:
            sinks.append(TensorBoardSink(out / TENSORBOARD_FOLDER, purge_step=step + 1))
        except UserError:
            if tensorboard:
                raise
    if wandb is not None:
        sinks.append(WandbSink(out, wandb, resolved(out).name, to_dict(config)))
    return sinks


def scalars(row: dict[str, Any]) -> dict[str, float]:
    """The finite numbers of a row by tag: ``loss/full``, ``loss/masked``, ``mse_q0/full``, ...,
    ``speed/img_per_s``, ..., and the rest under ``train/``; ``step`` and ``time`` are axes, not values."""
    return {
        _tag(key): float(value)
        for key, value in row.items()
        if key not in ("step", "time") and isinstance(value, int | float) and math.isfinite(value)
    }


def _tag(key: str) -> str:
    if loss := LOSS.fullmatch(key):
        return f"{loss[2]}/{'masked' if loss[1] else 'full'}"
    return f"speed/{key}" if key in SPEED else f"train/{key}"


class TensorBoardSink:
    """Writes event files to ``folder``. ``purge_step``: hides entries of older files from this step on,
    because the run resumed from before them. Raises ``UserError`` if TensorBoard cannot be imported."""

    name = "TensorBoard"

    def __init__(self, folder: Path, *, purge_step: int | None = None):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except Exception as error:  # an incompatible protobuf raises a TypeError, for example
            raise UserError(
                f"tensorboard: cannot be imported ({error}); pip install 'mdt-fast[watch]'"
            ) from None
        # A thread writes; the queue holds many rows, so that a slow disk does not stall training.
        self._writer: Any = SummaryWriter(str(folder), purge_step=purge_step, max_queue=10_000, flush_secs=30)

    def write(self, row: dict[str, Any]) -> None:
        for tag, value in scalars(row).items():
            self._writer.add_scalar(tag, value, row["step"], row.get("time"))

    def picture(self, name: str, path: Path, step: int) -> None:
        with Image.open(path) as image:
            pixels_HWC = np.asarray(image.convert("RGB"))
        self._writer.add_image(name, pixels_HWC, step, dataformats="HWC")

    def close(self) -> None:
        self._writer.close()


def imported_wandb() -> Any:
    """The wandb module. ``UserError`` if it cannot be imported."""
    try:
        import wandb

        wandb.init  # a folder named wandb, which wandb leaves behind, can also be imported  # noqa: B018
    except (ImportError, AttributeError) as error:
        raise UserError(f"wandb: cannot be imported ({error}); pip install wandb") from None
    return wandb


class WandbSink:
    """A run on Weights & Biases. Its id is stored in ``folder``, so that a resumed run continues in it.

    ``UserError`` if wandb is not installed or cannot start a new run. If it cannot resume one (no network),
    the first ``write`` raises instead, so that an unattended restart still trains.
    """

    name = "wandb"

    def __init__(self, folder: Path, project: str, name: str, config: dict[str, Any]):
        wandb = imported_wandb()
        self._wandb, self._error = wandb, None
        kept = folder / WANDB_ID
        known = _read_id(kept)
        run_id = known or secrets.token_hex(4)
        try:
            self._run: Any = wandb.init(
                project=project, name=name, id=run_id, resume="allow", config=config, dir=str(folder)
            )
            # The axis is a separate value, because wandb drops values for a step that it has already seen.
            self._run.define_metric("step")
            self._run.define_metric("*", step_metric="step")
        except Exception as error:
            if known is None:
                raise UserError(
                    f"wandb: cannot start a run in project {project!r}: {_one_line(error)}"
                ) from None
            self._error = error
        if known is None:
            with aside(kept) as file:
                file.write_text(run_id + "\n")

    def write(self, row: dict[str, Any]) -> None:
        self._log(scalars(row), row["step"])

    def picture(self, name: str, path: Path, step: int) -> None:
        self._log({name: self._wandb.Image(str(path))}, step)

    def _log(self, values: dict[str, Any], step: int) -> None:
        if self._error is not None:
            raise self._error
        self._run.log({**values, "step": step})

    def close(self) -> None:
        if self._error is None:
            self._run.finish()


def _read_id(path: Path) -> str | None:
    if not path.exists():
        return None
    text = path.read_text(errors="replace").strip()
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", text):
        raise UserError(f"{path}: holds no wandb run id; remove it to begin a new run")
    return text


class Sinks:
    """Several sinks as one. A sink that fails is reported once, through ``say``, and dropped; training
    continues."""

    def __init__(self, sinks: Iterable[Sink], say: Callable[[str], None]):
        self._sinks, self._say = list(sinks), say

    def write(self, row: dict[str, Any]) -> None:
        self._each(lambda sink: sink.write(row))

    def picture(self, name: str, path: Path, step: int) -> None:
        self._each(lambda sink: sink.picture(name, path, step))

    def close(self) -> None:
        self._each(lambda sink: sink.close())
        self._sinks = []

    def _each(self, call: Callable[[Sink], None]) -> None:
        for sink in list(self._sinks):
            try:
                call(sink)
            except Exception as error:
                self._sinks.remove(sink)
                self._say(f"warning: {sink.name} failed and is off for this run: {_one_line(error)}")


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
