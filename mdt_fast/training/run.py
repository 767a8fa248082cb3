"""A run's parts: checked settings, data, model, optimiser, and the folder they are kept in."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ..config import RunConfig, SampleConfig, to_dict
from ..data import ImageSet, Loader, check_classes, open_images
from ..diffusion import GaussianDiffusion, create_diffusion
from ..errors import UserError
from ..files import aside
from ..models.zoo import build_model
from ..optim import FusedAdamW, FusedAdan
from ..sampling import check_sampling, grid, sample, sampling_diffusion, save_picture, to_uint8
from . import checkpoint
from .checkpoint import Checkpoint
from .metrics import Metrics, plot_losses
from .optim import Ema, build_optimizer

# What may differ from the checkpoint when a run goes on; everything else decides the numbers.
MAY_CHANGE = (
    "train.steps", "train.log_every", "train.save_every", "train.keep", "train.device",
    "data.source", "data.workers", "data.on_unreadable", "sample.",
)  # fmt: skip
INIT = 10  # the seed stream of the initial weights; the loader and the loop have theirs
PREVIEW_ROWS, PREVIEW_COLUMNS, PREVIEW_STEPS = 10, 10, 20


@dataclass
class Run:
    """Everything the loop works with; ``step`` updates are done."""

    config: RunConfig
    out: Path
    step: int
    images: ImageSet
    loader: Loader
    device: torch.device
    model: nn.Module
    ema: Ema
    optimizer: FusedAdan | FusedAdamW
    diffusion: GaussianDiffusion
    start: Checkpoint | None

    def open(self) -> tuple[Metrics, list[str]]:
        """Make the folder ready to be written to; returns its metrics and what there is to say about it."""
        notes = [
            f"{section}: " + " ".join(f"{key}={value}" for key, value in settings.items())
            for section, settings in to_dict(self.config).items()
        ]
        if self.start is not None:
            notes.append(f"going on from {self.start.path} ({self.step} steps done)")
            if self.start.state["num_images"] != len(self.images.labels):
                notes.append(
                    f"warning: the data had {self.start.state['num_images']} images and now has "
                    f"{len(self.images.labels)}: batches will differ from the unbroken run's"
                )
            for moved in checkpoint.set_aside_later(self.out, self.step):
                notes.append(f"later checkpoint kept as {moved}")
        checkpoint.make_folder(self.out)
        with aside(self.out / "config.json") as file:
            file.write_text(json.dumps(to_dict(self.config), indent=1) + "\n")
        metrics = Metrics(
            self.out / "metrics.jsonl",
            step=self.step,
            num_timesteps=self.diffusion.num_timesteps,
            batch_size=self.config.train.batch_size,
        )
        if self.start is not None and checkpoint.METRICS in self.start.state["files"]:
            metrics.restore(self.start.tensors(checkpoint.METRICS), self.device)
        return metrics, notes

    def save(self, metrics: Metrics) -> Path:
        """A checkpoint of this moment, with the steps that are in no row of ``metrics`` yet."""
        return checkpoint.save(
            self.out,
            step=self.step,
            config=self.config,
            classes=self.images.classes,
            num_images=len(self.images.labels),
            model=self.model,
            ema=self.ema,
            optimizer=self.optimizer,
            pending=metrics.pending(self.step),
        )

    def draw_preview(self) -> None:
        """``samples/step_....png``: ten images of each of the first ten classes, in few steps."""
        (self.out / "samples").mkdir(exist_ok=True)
        config = replace(self.config.sample, steps=min(PREVIEW_STEPS, self.config.sample.steps))
        self._draw(self.out / "samples" / f"step_{self.step:07d}.png", config)

    def draw_final(self) -> None:
        """``samples.png``: the same with all of ``config.sample``'s steps."""
        self._draw(self.out / "samples.png", self.config.sample)

    def plot(self) -> None:
        plot_losses(self.out / "metrics.jsonl", self.out / "loss.png")

    def _draw(self, path: Path, config: SampleConfig) -> None:
        shown = range(min(PREVIEW_ROWS, len(self.images.classes)))
        labels = [label for label in shown for _ in range(PREVIEW_COLUMNS)]
        diffusion = sampling_diffusion(self.config.model, self.config.diffusion, config)
        drawn = sample(
            self.ema.model, diffusion, labels, config, diffusion_steps=self.config.diffusion.diffusion_steps
        )
        save_picture(path, grid(to_uint8(drawn), labels, self.images.classes))


def prepare(config: RunConfig, out: Path, resume: str | None) -> Run:
    """Check everything and build the run; nothing is written. ``UserError`` for whatever does not fit."""
    start = starting_point(out, resume)
    if start is not None:
        check_resumable(start.config, config)
    check_settings(config)
    images = open_images(config.data)
    check_classes(images.classes, config.model.num_classes)
    if start is not None and start.classes != images.classes:
        raise UserError(f"data.source: its classes are not those of the run in {str(start.run)!r}")
    device = resolve_device(config.train.device)
    torch.manual_seed(derive_seed(config.train.seed, INIT))
    model = build_model(config.model)
    if start is not None:
        model.load_state_dict(start.tensors(checkpoint.WEIGHTS["model"]))
    model.to(device).train()
    ema = Ema(model, config.train.ema_decay)
    optimizer = build_optimizer(model.parameters(), config.train)
    ema.attach(optimizer, model)
    if start is not None:
        ema.model.load_state_dict(start.tensors(checkpoint.WEIGHTS["ema"]))
        start.restore_optimizer(optimizer, model)
    return Run(
        config=config,
        out=out,
        step=start.step if start else 0,
        images=images,
        loader=Loader(images, config.data, batch_size=config.train.batch_size, seed=config.train.seed),
        device=device,
        model=model,
        ema=ema,
        optimizer=optimizer,
        diffusion=create_diffusion(
            noise_schedule=config.diffusion.noise_schedule,
            predict_xstart=config.diffusion.predict_xstart,
            learn_sigma=config.model.learn_sigma,
            diffusion_steps=config.diffusion.diffusion_steps,
            min_snr_gamma=config.diffusion.min_snr_gamma,
        ),
        start=start,
    )


def starting_point(out: Path, resume: str | None) -> Checkpoint | None:
    """The checkpoint to go on from, or None to start afresh. ``UserError`` if a run would be overwritten."""
    if out.exists() and not out.is_dir():
        raise UserError(f"--out: {str(out)!r} is a file; a folder is needed")
    newest = checkpoint.latest(out)
    holds_run = newest is not None or (out / "metrics.jsonl").exists()
    if resume is None:
        if holds_run:
            raise UserError(
                f"--out: {str(out)!r} already holds a run; go on with --resume auto, or choose another folder"
            )
        return None
    if resume == "auto":
        return open_or_advise(newest) if newest else None
    start = open_or_advise(Path(resume))
    if holds_run and start.run.resolve() != out.resolve():
        raise UserError(
            f"--resume: {resume!r} belongs to another run than the one in {str(out)!r}; choose another --out"
        )
    return start


def open_or_advise(path: Path, needed: Sequence[str] | None = None, use: str = "--resume {}") -> Checkpoint:
    """The checkpoint at ``path``, verified: all files, or the ``needed`` ones.

    If it is damaged, the error names the newest good one and says how to ``use`` it.
    """
    try:
        opened = checkpoint.open_checkpoint(path)
        for name in opened.state["files"] if needed is None else needed:
            opened.verify(name)
    except checkpoint.DamagedCheckpointError as error:
        run = path if (path / "checkpoints").is_dir() else path.absolute().parent.parent
        good = checkpoint.newest_good(run)
        advice = f"the newest good one is {good}: use {use.format(good)}" if good else "no other one is good"
        raise checkpoint.DamagedCheckpointError(f"{error}; {advice}") from None
    return opened


def check_resumable(saved: RunConfig, wanted: RunConfig) -> None:
    """``UserError`` if a setting that decides the numbers is not the checkpoint's."""
    before, after = _flat(to_dict(saved)), _flat(to_dict(wanted))
    for key, value in after.items():
        if before[key] != value and not key.startswith(MAY_CHANGE):
            raise UserError(f"{key}: cannot change when a run goes on; it has {before[key]!r}, got {value!r}")


def check_settings(config: RunConfig) -> None:
    """``UserError`` for settings that contradict each other or are out of range."""
    settings = config.train
    for name, lowest in (
        ("steps", 1), ("batch_size", 1), ("log_every", 1), ("save_every", 1), ("keep", 1),
        ("warmup_steps", 0), ("lr_anneal_steps", 0), ("seed", 0), ("max_grad_norm", 0),
    ):  # fmt: skip
        if not getattr(settings, name) >= lowest:
            raise UserError(f"train.{name}: must be at least {lowest}, got {getattr(settings, name)}")
    if settings.lr_anneal_steps and settings.steps > settings.lr_anneal_steps:
        raise UserError(
            f"train.steps: {settings.steps} goes beyond lr_anneal_steps {settings.lr_anneal_steps}, "
            "where the learning rate is 0"
        )
    if config.data.image_size != config.model.input_size:
        raise UserError(
            f"data.image_size: {config.data.image_size} is not model.input_size {config.model.input_size}"
        )
    if config.data.channels != config.model.in_channels:
        raise UserError(
            f"data.channels: {config.data.channels} is not model.in_channels {config.model.in_channels}"
        )
    try:
        sampling_diffusion(config.model, config.diffusion, config.sample)
        check_sampling(config.model, config.sample)
    except UserError as error:
        raise UserError(f"sample.{error}") from None


def resolve_device(name: str) -> torch.device:
    """``auto`` (CUDA if there is one), or a device by torch's name. ``UserError`` if there is none."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device: {name!r} is no device; use auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"--device: {name!r} asked for, this machine has {torch.cuda.device_count()} CUDA devices"
        )
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device: {name!r} is not supported; use auto, cpu, cuda or cuda:N")
    return device


def derive_seed(*parts: int) -> int:
    """One 63-bit seed from several numbers; different numbers give unrelated seeds."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> np.uint64(1))


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat.update(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return flat
