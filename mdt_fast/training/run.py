"""A run's parts: checked settings, data, model, optimiser, and the run's folder."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..config import RunConfig, SampleConfig, to_dict
from ..data import FirstStage, ImageSet, Loader, checked_set, open_first_stage, open_images
from ..diffusion import GaussianDiffusion, create_diffusion
from ..errors import UserError, one_line
from ..files import aside, remove_leftovers, resolved
from ..models.base import Transformer
from ..models.zoo import build_model
from ..optim import FusedAdamW, FusedAdan
from ..processes import resolve_device
from ..sampling import grid, sample, sampling_diffusion, save_picture, to_uint8
from . import checkpoint
from .checkpoint import Checkpoint
from .data import check_data, check_same_data
from .distributed import World, warnings_of_launch
from .metrics import Metrics, img_per_s, plot_losses
from .optim import Ema, LossScale, optimize
from .parallelize import parallelize, replicas, rows_of, same_weights
from .passes import GraphedPasses, Passes, hints, passes_of
from .saving import Saver
from .settings import check_resumable, check_settings
from .sinks import Sink, open_sinks
from .speed import Speed
from .states import restore_optimizer, training_state

INIT = 10  # the seed stream of the initial weights; the loader and the loop have their own
ORIGIN = "began_from"
"""A run that began from another run's checkpoint has that one's path in this file."""
PREVIEW_ROWS, PREVIEW_COLUMNS, PREVIEW_STEPS = 10, 10, 20


@dataclass
class Run:
    """Everything the loop works with, after ``step`` updates. ``masters``: float32 master weights by name, if
    the model holds them rounded to bfloat16 (``train.weights``)."""

    config: RunConfig
    out: Path
    world: World
    step: int
    images: ImageSet
    first_stage: FirstStage
    loader: Loader
    rows: slice
    device: torch.device
    model: Transformer
    sharded: bool
    masters: dict[str, Tensor]
    ema: Ema
    optimizer: FusedAdan | FusedAdamW
    loss_scale: LossScale | None
    diffusion: GaussianDiffusion
    passes: Passes | GraphedPasses
    saver: Saver
    start: Checkpoint | None
    notes: list[str] = field(default_factory=list)
    on_sampling_step: Callable[[int, int], None] | None = None
    """Called after each sampling step of a picture. If it raises, sampling stops; it does so on all ranks."""

    def open(self) -> tuple[Metrics, list[str]]:
        """Prepare the folder for writing; returns its metrics, and notes to print."""
        notes = [
            f"{section}: " + " ".join(f"{key}={value}" for key, value in settings.items())
            for section, settings in to_dict(self.config).items()
        ]
        parameters = sum(p.numel() for p in self.model.parameters())
        notes.append(
            f"{self.config.model.family}: {parameters:,} parameters; {len(self.images.labels):,} images in "
            f"{len(self.images.classes)} classes; {self.world.size} x {self.device.type}"
        )
        notes += self.notes
        pending: dict[str, Any] = {}
        if self.start is not None:
            notes.append(f"resuming from {self.start.path} ({self.step} steps done)")
            pending = self.start.tensors(checkpoint.OPTIMIZER, f"{checkpoint.METRICS}/")
        elif (self.out / "metrics.jsonl").exists():
            notes.append(f"no checkpoint in {str(self.out)!r}: the run begins again, and its metrics do")
        self.world.barrier()  # all ranks have read the checkpoint that they resume from
        if self.world.main:
            for moved in checkpoint.set_aside_later(self.out, self.step):
                notes.append(f"later checkpoint kept as {moved}")
            checkpoint.make_folder(self.out)
            for folder in (self.out, self.out / "samples"):
                remove_leftovers(folder)
            with aside(self.out / "config.json") as file:
                file.write_text(json.dumps(to_dict(self.config), indent=1) + "\n")
            if self.start is None:
                (self.out / ORIGIN).unlink(missing_ok=True)  # of a run that was here before
            elif resolved(self.start.run) != resolved(self.out):
                with aside(self.out / ORIGIN) as file:
                    file.write_text(f"{self.start.path.absolute()}\n")
        metrics = Metrics(
            self.out / "metrics.jsonl",
            step=self.step,
            num_timesteps=self.diffusion.num_timesteps,
            batch_size=self.config.train.batch_size,
            max_skips=self.config.train.max_skips,
            world=self.world,
            speed=self._speed().of if self.world.main else img_per_s,
        )
        if self.start is not None:
            metrics.restore(
                {name.removeprefix(f"{checkpoint.METRICS}/"): values for name, values in pending.items()},
                self.start.state["streak"],
                self.start.state["skipped"],
            )
        self.world.barrier()
        return metrics, notes

    def open_sinks(self) -> list[Sink]:
        """Open TensorBoard and wandb on rank 0; other ranks get an empty list."""
        settings = self.config.train
        if not self.world.main:
            return []
        return open_sinks(
            self.out, self.config, self.step, tensorboard=settings.tensorboard, wandb=settings.wandb
        )

    def _speed(self) -> Speed:
        return Speed(self.config.model, self.device, self.config.train.dtype, self.world.size)

    def save(self, metrics: Metrics) -> None:
        """Save a checkpoint of the current state, including the steps not yet in a row of ``metrics``."""
        parts, state = training_state(self, metrics)
        self.saver.save(self.step, parts, state, metrics.bad)

    @property
    def replicas(self) -> int:
        """Number of processes that each hold all the weights."""
        return replicas(self.config.train, self.world)

    def draw_preview(self) -> tuple[str, Path, int]:
        """Draw ``samples/step_....png``: ten images of each of the first ten classes, in few steps."""
        config = replace(
            self.config.sample, steps=min(PREVIEW_STEPS, self.config.sample.steps), sampler="ddim"
        )
        path = self.out / "samples" / f"step_{self.step:07d}.png"
        self._draw(path, config)
        return "samples", path, self.step

    def draw_final(self) -> tuple[str, Path, int]:
        """Draw ``samples.png``: the same classes and seeds with all settings of ``config.sample``."""
        self._draw(self.out / "samples.png", self.config.sample)
        return "samples", self.out / "samples.png", self.step

    def plot(self) -> None:
        if self.world.main and (self.out / "metrics.jsonl").exists():  # not if stopped before the first row
            try:
                plot_losses(self.out / "metrics.jsonl", self.out / "loss.png")
            except Exception as error:  # such as edited values in the rows
                raise UserError(f"loss.png: {one_line(error)}") from error

    def preview_labels(self) -> list[int]:
        shown = range(min(PREVIEW_ROWS, len(self.images.classes)))
        return [label for label in shown for _ in range(PREVIEW_COLUMNS)]

    def _draw(self, path: Path, config: SampleConfig) -> None:
        """Sample with the EMA weights, an equal share of the images on each process.

        Whatever could fail on a single process (the autoencoder, the disk) runs on rank 0 only.
        """
        labels = self.preview_labels()
        first, own = equal_share(labels, self.world.rank, self.world.size)
        diffusion = sampling_diffusion(self.config.model, self.config.diffusion, config)
        # Occasional pictures are not worth compiling the blocks for other shapes and without gradients.
        with self.ema.in_model() as model, torch.compiler.set_stance("force_eager"):
            latents = sample(
                model, diffusion, own, config, first_index=first,
                clip_denoised=self.first_stage.clip, on_step=self.on_sampling_step,
            )  # fmt: skip
        drawn = torch.cat(self.world.all_gather(latents.cpu()))[: len(labels)]
        if self.world.main:
            try:
                images = self.first_stage.decode(drawn)
            except torch.OutOfMemoryError:
                raise UserError(f"{path.name}: not enough GPU memory to decode it") from None
            path.parent.mkdir(exist_ok=True)
            save_picture(path, grid(to_uint8(images), labels, self.images.classes))


def equal_share(labels: list[int], rank: int, size: int) -> tuple[int, list[int]]:
    """Index of one process's first label, and its labels. The last label is repeated so that every process
    gets the same number."""
    share = -(-len(labels) // size)
    padded = labels + labels[-1:] * (share * size - len(labels))
    return rank * share, padded[rank * share : (rank + 1) * share]


def prepare(
    config: RunConfig,
    out: Path,
    resume: str | None,
    world: World | None = None,
    images: ImageSet | None = None,
) -> Run:
    """Check everything and build the run; nothing is written. ``images`` None: open ``config.data.source``.
    ``UserError`` for anything inconsistent."""
    world = world or World()
    start = world.from_main(_starting_path(out, resume) if world.main else None)
    start = None if start is None else open_or_advise(start, world=world)
    notes = warnings_of_launch()
    if start is not None:
        notes += check_resumable(start.config, config)
        check_steps_left(start, config, out)
    check_settings(config)
    rows = rows_of(world, config.train)
    device = resolve_device(config.train.device)
    images = open_images(config.data) if images is None else checked_set(images, config.data)
    first_stage = open_first_stage(config.data, images, device)
    notes += [] if start is None else check_same_data(start, config, images, first_stage)
    check_data(config, images, first_stage, world)
    torch.manual_seed(derive_seed(config.train.seed, INIT))
    model: Any = build_model(config.model)
    model.to(device).train()
    sharded = parallelize(model, config.train, world, device)
    parameters = dict(model.named_parameters())
    if start is not None:
        start.fill(checkpoint.MODEL, {name: p.detach() for name, p in parameters.items()}, world)
    if replicas(config.train, world) > 1:
        same_weights(model)
    optimizer, ema, masters = optimize(model, config.train)
    loss_scale = LossScale(device) if config.train.dtype == "float16" else None
    if start is not None:
        start.fill(checkpoint.EMA, ema.tensors, world)
        restore_optimizer(start, optimizer, loss_scale, parameters, world)
    diffusion = create_diffusion(learn_sigma=config.model.learn_sigma, **to_dict(config.diffusion))
    passes = Passes(model, diffusion, config.train, sharded, device, replicas(config.train, world))
    return Run(
        config=config, out=out, world=world, step=start.step if start else 0,
        images=images, first_stage=first_stage, rows=rows, device=device,
        loader=Loader(
            images, config.data, batch_size=config.train.batch_size, seed=config.train.seed, rows=rows,
            pinned=device.type == "cuda",
        ),
        model=model, sharded=sharded, masters=masters, ema=ema, optimizer=optimizer, loss_scale=loss_scale,
        diffusion=diffusion, passes=passes_of(passes),
        saver=Saver(
            out, world, keep=config.train.keep, keep_every=config.train.keep_every,
            asynchronous=config.train.async_save,
        ),
        start=start, notes=notes + hints(passes),
    )  # fmt: skip


def check_steps_left(start: Checkpoint, config: RunConfig, out: Path) -> None:
    """``UserError`` if the checkpoint is past ``train.steps``, or a new run from it would have no steps."""
    steps, elsewhere = config.train.steps, resolved(start.run) != resolved(out)
    if start.step > steps or (elsewhere and start.step == steps):
        least = start.step + 1 if elsewhere else start.step
        raise UserError(
            f"train.steps: the checkpoint {str(start.path)!r} is at step {start.step}; "
            f"use at least {least}, got {steps}"
        )


def _starting_path(out: Path, resume: str | None) -> Path | None:
    start = starting_point(out, resume)
    return None if start is None else start.path


def starting_point(out: Path, resume: str | None) -> Checkpoint | None:
    """The checkpoint to resume from, or None to start afresh. ``UserError`` if a run would be overwritten."""
    checkpoint.check_place(out)
    newest = checkpoint.latest(out)
    origin = Path((out / ORIGIN).read_text().strip()) if (out / ORIGIN).is_file() else None
    holds_run = newest is not None or (out / "metrics.jsonl").exists()
    if resume is None:
        if holds_run:
            raise UserError(
                f"out: {str(out)!r} already holds a run; use --resume auto, or choose another folder"
            )
        return None
    if resume == "auto":
        path = newest or origin
        if newest is None and origin is not None and not origin.exists():
            raise UserError(
                f"out: {str(out)!r} began from {str(origin)!r}, which does not exist any more; "
                "choose another folder"
            )
        return open_or_advise(path, ()) if path else None
    start = open_or_advise(Path(resume), ())
    again = newest is None and origin is not None and resolved(start.path) == resolved(origin)
    if holds_run and not again and resolved(start.run) != resolved(out):
        began_there = (
            newest is None and origin is not None and resolved(start.run) in resolved(origin).parents
        )
        advice = "use --resume auto, or choose another --out" if began_there else "choose another --out"
        raise UserError(f"resume: {resume!r} belongs to a different run than {str(out)!r}; {advice}")
    return start


def open_or_advise(
    path: Path,
    parts: Sequence[str] = checkpoint.PARTS,
    use: str = "--resume {}",
    world: World | None = None,
) -> Checkpoint:
    """Open the checkpoint at ``path`` and verify ``parts``; each process of ``world`` verifies some files.

    If it is damaged, the error names the newest intact one; ``use`` is the template of how to use it.
    """
    try:
        opened = checkpoint.open_checkpoint(path)
        if parts:
            opened.verify(*parts, world=world)
    except checkpoint.DamagedCheckpointError as error:
        run = path if (path / "checkpoints").is_dir() else path.absolute().parent.parent
        good = checkpoint.newest_good(run)
        advice = f"the newest intact one is {good}: use {use.format(good)}" if good else "no other is intact"
        raise checkpoint.DamagedCheckpointError(f"{error}; {advice}") from None
    return opened


def derive_seed(*parts: int) -> int:
    """Derive one 63-bit seed from several numbers; different numbers give unrelated seeds."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> np.uint64(1))
