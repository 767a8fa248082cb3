"""The training loop: the two-pass objective of MDT, one step after the other.

Everything random in step s comes from (seed, s): the batch, timesteps, noise, label drops and masks. So a
resumed run needs no generator states, and goes on bit for bit as the unbroken one on the same machine.
"""

import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from ..config import RunConfig
from ..diffusion import GaussianDiffusion
from ..errors import UserError
from .checkpoint import latest, locked
from .metrics import Metrics
from .optim import learning_rate, set_learning_rate
from .progress import TrainingProgress
from .run import Run, derive_seed, prepare

STEP = 11  # the seed stream of training steps
PICTURE_SPACING = 20  # training takes this many times longer than drawing


@dataclass(frozen=True)
class Result:
    """How a run ended: updates done in all, the newest metrics, and the signal that stopped it, if any."""

    steps: int
    row: dict[str, Any]
    seconds: float
    signal: int | None = None


def two_pass_losses(
    model: nn.Module, diffusion: GaussianDiffusion, x: Tensor, t: Tensor, y: Tensor
) -> dict[str, Tensor]:
    """Loss terms, each [B]: ``loss``, ``mse``, ``vb`` over all tokens, then ``m_...`` of the masked pass.

    Both passes share x [B, C, S, S], t [B] and y [B]; noise, label drops and the mask are drawn anew. Models
    without a mask (DiT, or ``mask_ratio`` None) have the first pass only; the fast models run both as one.
    """
    if getattr(model, "mask_ratio", None) is None:
        return diffusion.training_losses(model, x, t, {"y": y})
    if hasattr(model, "training_step_outputs"):
        return diffusion.two_pass_losses(model, x, t, y)
    terms = diffusion.training_losses(model, x, t, {"y": y})
    masked = diffusion.training_losses(model, x, t, {"y": y, "enable_mask": True})
    return terms | {f"m_{name}": values for name, values in masked.items()}


def total_loss(terms: dict[str, Tensor]) -> Tensor:
    """The sum, not the average, of the passes' mean losses."""
    loss = terms["loss"].mean()
    return loss + terms["m_loss"].mean() if "m_loss" in terms else loss


def train_step(run: Run, x: Tensor, y: Tensor, metrics: Metrics) -> None:
    """One update from images x [B, C, S, S] in [-1, 1] and labels y [B]."""
    settings = run.config.train
    torch.manual_seed(derive_seed(settings.seed, STEP, run.step))
    x, y = x.to(run.device, non_blocking=True), y.to(run.device, non_blocking=True)
    t = torch.randint(run.diffusion.num_timesteps, y.shape, device=run.device)
    with torch.autocast(run.device.type, torch.bfloat16, enabled=settings.dtype == "bfloat16"):
        terms = two_pass_losses(run.model, run.diffusion, x, t, y)
        loss = total_loss(terms)
    run.optimizer.zero_grad()
    loss.backward()
    set_learning_rate(run.optimizer, learning_rate(settings, run.step))
    run.optimizer.step()  # moves the average too
    metrics.add(terms, t, run.optimizer.grad_norm.float())
    run.step += 1


def train(
    config: RunConfig, out: Path, *, resume: str | None = None, console: Console | None = None
) -> Result:
    """Train until ``config.train.steps`` updates are done, and leave everything in the folder ``out``.

    ``resume``: None starts a run, in a folder that has none; ``"auto"`` goes on from the newest checkpoint
    in ``out``, or starts if there is none; a path goes on from that checkpoint. SIGINT, SIGTERM and SIGHUP
    save a checkpoint and end the run. Raises ``UserError`` for bad settings, unreadable images, damaged
    checkpoints, a full disk and a loss that is not finite; it names the last checkpoint. What is saved
    stays.
    """
    with locked(out):
        run = prepare(config, out, resume)
        with TrainingProgress(run.step, config.train.steps, console) as bar, Interrupts() as interrupts:
            try:
                return _train(run, bar, interrupts)
            except (UserError, OSError) as error:
                last = latest(out)
                if last is None or str(last) in str(error):
                    raise
                raise UserError(f"{error}; the last checkpoint is {str(last)!r}") from error


def _train(run: Run, bar: TrainingProgress, interrupts: "Interrupts") -> Result:
    settings, began = run.config.train, time.perf_counter()
    metrics, notes = run.open()
    for note in notes:
        bar.say(note)
    pictures = Pictures(bar)
    row: dict[str, Any] = {}
    for x, y in run.loader.batches(run.step, settings.steps):
        train_step(run, x, y, metrics)
        planned = run.step == settings.steps or run.step % settings.save_every == 0
        last = run.step == settings.steps or interrupts.caught is not None
        saving = last or planned
        logging = planned or run.step % settings.log_every == 0
        if logging:
            row = metrics.row(run.step, learning_rate(settings, run.step - 1))
        bar.update(run.step, row if logging else None)
        if saving:
            run.save(metrics)
            if not last:
                pictures.draw_if_cheap(run.plot, run.draw_preview)
            metrics.restart_clock()  # img/s is training's own
        if last:
            break
    pictures.draw(run.plot, *(() if interrupts.caught else (run.draw_final,)))
    return Result(run.step, row, time.perf_counter() - began, interrupts.caught)


class Pictures:
    """Draws the run's pictures: an extra, so what keeps one from being made is only said."""

    def __init__(self, bar: TrainingProgress):
        self.bar = bar
        self._finished, self._took = time.perf_counter(), 0.0

    def draw_if_cheap(self, *makers: Callable[[], None]) -> None:
        """Draw unless that would take more than a twentieth of the time, judging by the last drawing."""
        if time.perf_counter() - self._finished >= PICTURE_SPACING * self._took:
            self.draw(*makers)

    def draw(self, *makers: Callable[[], None]) -> None:
        began = time.perf_counter()
        for make in makers:
            try:
                make()
            except (UserError, OSError) as error:
                self.bar.say(f"warning: no picture: {error}")
        self._finished = time.perf_counter()
        self._took = self._finished - began


class Interrupts:
    """Within ``with``, the first SIGINT, SIGTERM or SIGHUP is only noted in ``caught``.

    After it SIGINT and SIGTERM act as usual. Signals that are ignored (SIGHUP under nohup) stay so.
    """

    NUMBERS = tuple(
        getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
    )

    def __init__(self) -> None:
        self.caught: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Interrupts":
        if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handlers
            self._before = {
                number: signal.signal(number, self._note)
                for number in self.NUMBERS
                if signal.getsignal(number) != signal.SIG_IGN
            }
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.caught = self.caught or number
        for usual in (signal.SIGINT, signal.SIGTERM):  # not SIGHUP: a terminal that closes sends several
            if usual in self._before:
                signal.signal(usual, self._before[usual])
