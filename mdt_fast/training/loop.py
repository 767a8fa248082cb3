"""The training loop over MDT's two-pass objective.

Everything random in step s is seeded by (seed, s) and drawn for the whole batch: images, timesteps, noise,
label drops and masks. So a resumed run needs no generator states and matches the uninterrupted one bit for
bit on the same machine, and using more processes or micro-batches changes rounding only.
"""

import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from ..config import RunConfig
from ..data import ImageSet
from ..errors import UserError
from ..processes import Interrupts, resolve_device
from .checkpoint import locked, number_of, steps
from .distributed import joined, lost_processes_named
from .metrics import Metrics, NonFiniteLossError
from .objective import draw
from .optim import learning_rate, set_learning_rate, unripe
from .parallelize import split, sum_gradients
from .progress import TrainingProgress, summary
from .run import Run, derive_seed, prepare
from .sinks import TENSORBOARD_FOLDER, WANDB_ID, Sinks

STEP, POSTERIOR = 11, 12  # seed streams of training steps and of the posterior noise
PICTURE_SPACING = 20  # training must take at least this many times longer than drawing pictures
MADE = (
    "samples.png", "samples", "loss.png", "metrics.jsonl", TENSORBOARD_FOLDER, WANDB_ID, "config.json",
    "checkpoints",
)  # fmt: skip
"""What a run writes to its folder."""
SAVE_FAILED = 1000  # a value the processes can agree on, besides signal numbers


@dataclass(frozen=True)
class Result:
    """How a run ended: total updates, the latest row of metrics, and the signal that stopped it, if any.

    ``summary``: lines to print about the run since it started or resumed.
    """

    steps: int
    row: dict[str, Any]
    seconds: float
    signal: int | None = None
    summary: tuple[str, ...] = ()


def train_step(run: Run, batch: Tensor, y: Tensor, metrics: Metrics) -> None:
    """Do one update from this process's rows of the batch, as loaded, with labels y [b]."""
    settings = run.config.train
    torch.manual_seed(derive_seed(settings.seed, STEP, run.step))
    draws = draw(run.model, run.diffusion, settings.batch_size, run.device).rows(run.rows)
    posterior = posterior_noise(run)
    batch, y = batch.to(run.device, non_blocking=True), y.to(run.device, non_blocking=True)
    terms: list[dict[str, Tensor]] = []
    scale = None if run.loss_scale is None else run.loss_scale.scale
    run.passes.zero_grad()
    parts = split(run.rows, settings.accumulate)
    for part in parts:
        x = run.first_stage(batch[part], None if posterior is None else posterior[part])
        terms.append(run.passes(x, y[part], draws.rows(part), scale, last=part is parts[-1]))
    if run.replicas > 1:
        sum_gradients(run.model.parameters())
    if run.loss_scale is not None:
        run.loss_scale.unscale(run.optimizer)
    set_learning_rate(run.optimizer, learning_rate(settings, run.step))
    run.optimizer.step()  # updates the EMA too
    if run.loss_scale is not None:
        run.loss_scale.update(run.optimizer.grad_norm)
    whole = {name: torch.cat([part[name] for part in terms]) for name in terms[0]}
    metrics.add(whole, draws.t, run.optimizer.grad_norm.float())
    run.step += 1


def posterior_noise(run: Run) -> Tensor | None:
    """This process's rows of the noise that samples a step's latents, [b, C, S, S]; None for pixels."""
    stage, settings = run.first_stage, run.config.train
    if not stage.random:
        return None
    generator = torch.Generator(run.device).manual_seed(derive_seed(settings.seed, POSTERIOR, run.step))
    shape = settings.batch_size, stage.channels, stage.size, stage.size
    return torch.randn(shape, generator=generator, device=run.device)[run.rows]


def train(
    config: RunConfig,
    out: str | Path,
    *,
    resume: str | Path | None = None,
    console: Console | None = None,
    images: ImageSet | None = None,
) -> Result:
    """Train until ``config.train.steps`` updates are done, writing everything to the folder ``out``.

    ``resume``: None starts a run, in a folder without one; ``"auto"`` resumes from the newest checkpoint in
    ``out``, or starts if there is none; a path resumes from that checkpoint. SIGINT, SIGTERM, SIGUSR1 and
    SIGHUP save a checkpoint and end the run. ``images``: a custom data set that replaces
    ``config.data.source``; pass it again when resuming. Under torchrun, each process handles its part of
    every batch. Raises ``UserError`` for bad settings, unreadable images, damaged checkpoints, a full disk,
    losses that stay non-finite and a lost process; it names the last checkpoint. Saved files stay.
    """
    if not isinstance(config, RunConfig):
        raise UserError(
            f"config: got {type(config).__name__}, expected a RunConfig (mdt_fast.presets has some)"
        )
    if out == "" or not isinstance(out, str | Path):
        raise UserError(f"out: got {out!r}, expected a folder")
    if resume == "" or not isinstance(resume, str | Path | None):
        raise UserError(f"resume: got {resume!r}, expected None, 'auto' or the path of a run or checkpoint")
    out, resume = Path(out), None if resume is None else str(resume)
    with joined(resolve_device(config.train.device)) as world, ExitStack() as stack:
        if world.main:
            stack.enter_context(locked(out))
        stack.enter_context(lost_processes_named(world))
        run = prepare(config, out, resume, world, images)
        world.barrier()  # all ranks have read the folder before it is written to
        bar = TrainingProgress(run.step, config.train.steps, console, quiet=not world.main)
        try:
            with lost_processes_named(world), bar, Interrupts() as interrupts:
                return _train(run, bar, interrupts)
        except (UserError, OSError) as error:
            with suppress(Exception):  # let a checkpoint in progress finish; report only the first error
                run.saver.wait()
            if advice := where_to_resume(out, error):
                raise UserError(f"{error}; {advice}") from error
            raise


def where_to_resume(out: Path, error: Exception) -> str:
    """Names the run's last checkpoint, unless ``error`` does: if losses are not finite, one from before."""
    saved = steps(out)
    if not saved or str(saved[-1]) in str(error):
        return ""
    if isinstance(error, NonFiniteLossError) and number_of(saved[-1]) >= error.step:
        before = [path for path in saved if number_of(path) < error.step]
        if not before:
            return "no checkpoint is from before that step"
        return f"the last checkpoint before that step is {str(before[-1])!r}, from which to resume"
    return f"the last checkpoint is {str(saved[-1])!r}"


def _train(run: Run, bar: TrainingProgress, interrupts: Interrupts) -> Result:
    settings, first, began = run.config.train, run.step, time.perf_counter()
    metrics, notes = run.open()
    for note in notes:
        bar.say(note)
    sinks = Sinks(run.open_sinks(), bar.say)
    pictures = Pictures(bar, run, sinks, interrupts)
    row: dict[str, Any] = {}
    asked = left_out = 0
    for batch, y in run.loader.batches(run.step, settings.steps):
        train_step(run, batch, y, metrics)
        asked = run.world.agree(SAVE_FAILED if run.saver.failed else interrupts.caught or 0)
        if asked == SAVE_FAILED:
            break
        planned = run.step == settings.steps or run.step % settings.save_every == 0
        last = run.step == settings.steps or asked
        saving = last or planned
        logging = planned or run.step % settings.log_every == 0
        if logging:
            row = metrics.row(run.step, learning_rate(settings, run.step - 1))
            sinks.write(row)
            if (unreadable := all_unreadable(run)) and len(unreadable) > left_out:
                left_out, first_error = len(unreadable), next(iter(unreadable.values()))
                bar.say(f"warning: {left_out} unreadable images replaced by others; the first: {first_error}")
        bar.update(run.step, row if logging else None)
        if saving:
            run.save(metrics)
            if not last:
                pictures.draw_if_cheap(run.plot, run.draw_preview)
            metrics.restart_clock()  # img/s covers training only
        if last:
            break
    run.saver.close()
    pictures.draw(run.plot)
    if not asked:
        bar.say(f"drawing samples.png: {len(run.preview_labels())} images, {run.config.sample.steps} steps")
        pictures.draw(run.draw_final)
    sinks.close()
    seconds = time.perf_counter() - began
    lines = summary(
        row, run.step, seconds, first=first, batch_size=settings.batch_size, world_size=run.world.size,
        num_images=len(run.images.labels), peak_memory_gib=bar.peak_memory_gib,
        files=[run.out / name for name in MADE if (run.out / name).exists()],
    )  # fmt: skip
    if not asked and (warning := unripe(settings.ema_decay, run.step)) is not None:
        lines.insert(0, warning)
    return Result(run.step, row, seconds, asked or None, tuple(lines))


Picture = tuple[str, Path, int] | None
"""Series name, file, step."""


class Pictures:
    """Draws the run's pictures. They are an extra, so a failure only prints a warning.

    A signal stops drawing after the current sampling step; training progress is already saved by then.
    """

    def __init__(self, bar: TrainingProgress, run: Run, sinks: Sinks, interrupts: Interrupts):
        self.bar, self.run, self.sinks, self.interrupts = bar, run, sinks, interrupts
        self._finished, self._took = time.perf_counter(), 0.0
        run.on_sampling_step = self._go_on

    def draw_if_cheap(self, *makers: Callable[[], Picture]) -> None:
        """Draw unless that would take more than a twentieth of the time, judging by the last drawing."""
        cheap = time.perf_counter() - self._finished >= PICTURE_SPACING * self._took
        if self.run.world.from_main(cheap):  # all ranks take part
            self.draw(*makers)

    def draw(self, *makers: Callable[[], Picture]) -> None:
        began = time.perf_counter()
        try:
            for make in makers:
                try:
                    picture = make()
                    if picture is not None:
                        self.sinks.picture(*picture)
                except (UserError, OSError) as error:
                    self.bar.say(f"warning: no picture: {error}")
                except torch.OutOfMemoryError:
                    if self.run.world.size > 1:  # the other ranks are waiting for this one
                        raise
                    self.bar.say("warning: no picture: not enough GPU memory")
        finally:
            self.run.world.settle()
        self._finished = time.perf_counter()
        self._took = self._finished - began

    def _go_on(self, done: int, of: int) -> None:
        """Called after each sampling step; all processes stop after the same one."""
        if self.run.world.agree(self.interrupts.caught or 0):
            raise UserError("interrupted")


def all_unreadable(run: Run) -> dict[int, str]:
    """Images that any process has skipped, with the errors. All processes must call this."""
    if run.config.data.on_unreadable == "stop":
        return {}
    found: dict[int, str] = {}
    for of_one in run.world.all_gather_object(dict(run.loader.unreadable)):
        found |= of_one
    return found
