"""One learner of ``convergence.py``: trained from a seed and judged several times along the way.

B: images of a batch, [C, S, S] each. All randomness in step s depends on (seed, s) only, so that all variants
of a seed see the same images, timesteps and noise.
"""

import hashlib
import json
import math
import sys
import time
import zipfile
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from formats import one_line
from judge import NOISE, Data, Judge, load_judge, open_data
from learners import Variant
from mdt_fast.config import ModelConfig, RunConfig, TrainConfig, to_dict
from mdt_fast.data import Loader
from mdt_fast.diffusion import GaussianDiffusion, create_diffusion
from mdt_fast.files import aside
from mdt_fast.masking import MaskPlan, len_keeps
from mdt_fast.models import flops
from mdt_fast.models.float8 import use_float8
from mdt_fast.models.zoo import build_model
from mdt_fast.sampling import sample
from mdt_fast.training.distributed import World
from mdt_fast.training.loop import STEP
from mdt_fast.training.objective import Draws, draw, drop, losses_of, total_loss
from mdt_fast.training.optim import learning_rate, optimize, set_learning_rate
from mdt_fast.training.parallelize import autocasting, parallelize
from mdt_fast.training.passes import GraphedPasses, Passes, passes_of
from mdt_fast.training.run import INIT, derive_seed

SHOWN = 10  # samples kept from each evaluation, for the figure


@dataclass(frozen=True, kw_only=True)
class Job:
    """A variant and a seed. ``settings`` are the variant's, ``steps`` is when it is judged, ``folder`` is
    where pictures go, and ``judge`` is the classifier's file."""

    study: str
    variant: Variant
    settings: RunConfig
    seed: int
    steps: tuple[int, ...]
    folder: Path
    judge: Path
    classes: int
    threads: int

    @cached_property
    def digest(self) -> str:
        """A digest of everything the result depends on. It is the same in every study with this learner,
        under any name, and in later versions with more settings, as long as those keep their defaults."""
        variant = {name: getattr(self.variant, name) for name in ("passes", "without", "implementation")}
        settings = changed(to_dict(self.settings), to_dict(RunConfig()))
        values = {
            "variant": variant, "settings": settings, "seed": self.seed, "steps": self.steps,
            "judge": hashlib.sha256(self.judge.read_bytes()).hexdigest(),
        }  # fmt: skip
        text = json.dumps(values, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def samples(self) -> Path:
        """The file for its pictures."""
        return samples_path(self.folder, self.digest)


@dataclass(frozen=True, kw_only=True)
class Point:
    """The evaluation after ``step`` updates, ``seconds`` of training and ``flops`` executed. ``loss`` is the
    mean over all tokens since the previous point. For a diverged learner ``loss`` may be NaN or infinite and
    ``frechet`` infinite; rows then hold null, as JSON has neither."""

    step: int
    seconds: float
    flops: float
    loss: float
    frechet: float
    accuracy: float

    @classmethod
    def of(cls, row: dict[str, Any]) -> "Point":
        """The point that a row was made from."""
        names = ("step", "seconds", "flops", "accuracy")
        loss = math.nan if row["loss"] is None else row["loss"]
        frechet = math.inf if row["p50"] is None else row["p50"]
        return cls(loss=loss, frechet=frechet, **{name: row[name] for name in names})


def learn(job: Job) -> list[Point]:
    """Train, and judge at ``job.steps``. Samples to show are saved in the folder, unless they are latents."""
    torch.set_num_threads(job.threads)
    device = torch.device(job.settings.train.device)
    data = open_data(job.settings.data, job.settings.sample.num_samples, device)
    judge = load_judge(job.judge, data, job.classes, job.settings.sample.num_samples, device)
    learner = Learner(job, device)
    loader = Loader(
        data.learnt, job.settings.data, batch_size=job.settings.train.batch_size, seed=job.seed,
        pinned=device.type == "cuda",
    )  # fmt: skip
    points, shown = [], []
    batches = loader.batches(0, job.steps[-1])
    learner.warm_up(data, next(loader.batches(0, 1)))
    for first, last in zip((0, *job.steps), job.steps):
        losses = []
        clock = Clock(device)
        for _ in range(first, last):
            losses.append(learner.step(data, next(batches)))
        learner.seconds += clock.seconds()
        pictures, labels = learner.pictures(data, job.classes)
        shown.append(pictures[:SHOWN].numpy())
        points.append(
            Point(
                step=last,
                seconds=learner.seconds,
                flops=learner.flops(),
                loss=torch.stack(losses).mean().item(),
                frechet=judge.distance(pictures),
                accuracy=judge.accuracy(pictures, labels),
            )
        )
        print(_line(job, points[-1], judge), flush=True)
    if data.stage.clip:
        with aside(job.samples) as file, file.open("wb") as opened:
            np.savez(opened, samples=np.stack(shown), steps=job.steps)
    return points


class Learner:
    """A model in training, with its ``seconds`` so far and the number of tokens ``kept`` in each step."""

    def __init__(self, job: Job, device: torch.device):
        self.job, self.device, settings = job, device, job.settings
        self.seconds, self.done = 0.0, 0
        self.kept: list[int | None] = []
        torch.manual_seed(derive_seed(job.seed, INIT))
        self.model: Any = build_model(settings.model, implementation=job.variant.implementation)
        self.model.to(device).train()
        for part in job.variant.without:
            leave_out(self.model, part)
        # Randomness and pictures are drawn with a fast model, whatever the implementation.
        self.drawing = self.model
        if job.variant.implementation == "fast":
            parallelized(self.model, settings.train, device)
        else:
            self.model.y_embedder.dropout_prob = 0.0  # labels arrive already dropped
            self.drawing = build_model(settings.model).to(device)
        self.optimizer, self.ema, _ = optimize(self.model, settings.train)
        self.diffusion = create_diffusion(
            learn_sigma=settings.model.learn_sigma, **to_dict(settings.diffusion)
        )
        self.passes: Passes | GraphedPasses | None = None  # as in the package's own training
        if job.variant.implementation == "fast" and job.variant.passes == "both":
            self.passes = passes_of(Passes(self.model, self.diffusion, settings.train, False, device))

    def warm_up(self, data: Any, batch: tuple[Tensor, Tensor]) -> None:
        """Compile, capture all graphs and touch memory for the first time, without learning anything."""
        self._gradients(data, batch)
        config = self.job.settings.model
        if isinstance(self.passes, GraphedPasses) and config.family == "mdtv2":
            for len_keep in len_keeps(config.grid_size**2, config.mask_ratio or 0.0):
                self.zero_grad()
                self._gradients(data, batch, len_keep)
        self.zero_grad()
        self.kept.clear()

    def zero_grad(self) -> None:
        (self.passes or self.optimizer).zero_grad()

    def step(self, data: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
        """One update. Returns the loss over all tokens (over kept tokens, if that is the only pass)."""
        settings = self.job.settings.train
        self.zero_grad()
        loss = self._gradients(data, batch)
        set_learning_rate(self.optimizer, learning_rate(settings, self.done))
        self.optimizer.step()
        self.done += 1
        return loss

    def _gradients(self, data: Any, batch: tuple[Tensor, Tensor], len_keep: int | None = None) -> Tensor:
        """Compute gradients and return the loss. ``len_keep`` replaces the drawn number of kept tokens."""
        settings, B = self.job.settings.train, len(batch[0])
        x, y = (part.to(self.device, non_blocking=True) for part in batch)
        torch.manual_seed(derive_seed(self.job.seed, STEP, self.done))
        draws = draw(self.drawing, self.diffusion, B, self.device)
        if draws.plan is not None and len_keep is not None:
            noise_BL = torch.rand(B, self.job.settings.model.grid_size**2, device=self.device)
            plan = MaskPlan.from_noise(noise_BL, len_keep, ascending=draws.plan.ascending)
            draws = replace(draws, plan=plan)
        noise = None
        if data.stage.random:
            generator = torch.Generator(self.device).manual_seed(derive_seed(self.job.seed, NOISE, self.done))
            shape = B, data.stage.channels, data.stage.size, data.stage.size
            noise = torch.randn(shape, generator=generator, device=self.device)
        x = data.stage(x, noise)
        if self.passes is not None:
            terms = self.passes(x, y, draws, None)
        else:
            with autocasting(settings, False, self.device):
                terms = losses(self.model, self.diffusion, x, y, draws, self.job.variant)
                loss = total_loss(terms)
            loss.backward()
        self.kept.append(None if draws.plan is None else draws.plan.len_keep)
        return terms["loss"].detach().mean()

    def flops(self) -> float:
        """FLOPs executed so far."""
        settings = self.job.settings
        each = (flops_of(settings.model, kept, self.job.variant) for kept in self.kept)
        return settings.train.batch_size * sum(each)

    def pictures(self, data: Data, classes: int) -> tuple[Tensor, list[int]]:
        """Samples of the averaged weights and their labels, which cycle through the classes. The noise is the
        same each time and for every variant."""
        settings = self.job.settings
        labels = [i % classes for i in range(settings.sample.num_samples)]
        with self.ema.in_model() as model, torch.compiler.set_stance("force_eager"):
            if model is not self.drawing:
                self.drawing.load_state_dict(model.state_dict())
            drawn = sample(
                self.drawing, settings.diffusion, labels, settings.sample,
                clip_denoised=data.stage.clip,
            )  # fmt: skip
        return drawn, labels


def parallelized(model: Any, settings: TrainConfig, device: torch.device) -> None:
    """Set up the model as the package's training does. On a CPU float8 is emulated, with the same rounding,
    which is what learning depends on, but without any speed-up."""
    if settings.float8 and device.type != "cuda":
        use_float8(model, settings.float8_by, emulate=True)
        settings = replace(settings, float8=False)
    parallelize(model, settings, World(), device)


def losses(
    model: Any, diffusion: GaussianDiffusion, x: Tensor, y: Tensor, draws: Draws, variant: Variant
) -> dict[str, Tensor]:
    """Loss terms [B] of the variant's passes, for variants that do not use the package's own step."""
    if variant.passes == "all":
        return losses_of(model, diffusion, x, y, replace(draws, plan=None))
    if variant.passes == "twice":
        assert draws.noise_masked is not None
        second = replace(draws, noise=draws.noise_masked, dropped=draws.dropped_masked, plan=None)
        again = losses_of(model, diffusion, x, y, second)
        return losses_of(model, diffusion, x, y, replace(draws, plan=None)) | {
            f"m_{key}": value for key, value in again.items()
        }
    null, terms = model.config.num_classes, {}
    more = {"drop_labels": False} if variant.implementation == "fast" else {}
    if variant.passes == "both":
        kwargs = {"y": drop(y, draws.dropped, null), **more}
        terms = diffusion.training_losses(model, x, draws.t, kwargs, draws.noise)
    if draws.plan is None:
        return terms
    kwargs = {
        "y": drop(y, draws.dropped_masked, null), "enable_mask": True, "mask_plan": draws.plan, **more,
    }  # fmt: skip
    masked = diffusion.training_losses(model, x, draws.t, kwargs, draws.noise_masked)
    return terms | {f"m_{key}": value for key, value in masked.items()} if terms else masked


def leave_out(model: Any, part: str) -> None:
    """Disable a part of a new model by freezing its parameters at zero."""
    if part == "bias":
        held = [p for name, p in model.named_parameters() if name.endswith("relative_position_bias_table")]
    else:  # with zero gates, tokens pass through the block unchanged
        held = list(model.sideblocks[0].adaLN_modulation.parameters())
    for parameter in held:
        parameter.requires_grad_(False).zero_()


def flops_of(config: ModelConfig, len_keep: int | None, variant: Variant) -> float:
    """FLOPs that a training step with ``len_keep`` kept tokens executes for each image."""
    if variant.passes == "masked":  # one of the two passes
        return flops.train_step(config, len_keep).flops - flops.train_step(config, None).flops
    kept = len_keep if variant.passes == "both" else None
    batch = 2  # the work done once for a batch is shared
    once = flops.train_step(config, kept, variant.implementation, batch).flops / batch
    return 2 * once if variant.passes == "twice" else once


def changed(values: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """The values that differ from the defaults, with the same nesting."""
    inner = {
        name: changed(value, defaults[name]) if isinstance(value, dict) else value
        for name, value in values.items()
    }
    return {name: value for name, value in inner.items() if value not in (defaults[name], {})}


class Clock:
    """Time since the clock was made. On a GPU this is wall time, with synchronisation at both ends; on a CPU
    it is the process's CPU time divided by its threads, so that other work on the machine does not count."""

    def __init__(self, device: torch.device):
        self.device, self.began = device, self._now(device)

    def seconds(self) -> float:
        return self._now(self.device) - self.began

    def _now(self, device: torch.device) -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            return time.perf_counter()
        return time.process_time() / torch.get_num_threads()


def judged_at(steps: int, points: int) -> tuple[int, ...]:
    """Steps at roughly equal ratios, as curves are steep at first; the last step is included."""
    first = max(1, steps // 16)
    ratio = (steps / first) ** (1 / max(1, points - 1))
    return tuple(sorted({round(first * ratio**i) for i in range(points - 1)} | {steps}))


def shown_samples(folder: Path, digest: str) -> np.ndarray | None:
    """The samples that :func:`learn` saved for a job, [points, SHOWN, C, S, S]. None if there are none or if
    they cannot be read, which is reported on stderr."""
    path = samples_path(folder, digest)
    if not path.exists():
        return None
    try:
        with np.load(path) as saved:
            return saved["samples"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        print(f"{path}: cannot read samples, shown without: {one_line(error)}", file=sys.stderr)
        return None


def samples_path(folder: Path, digest: str) -> Path:
    return folder / f"samples-{digest}.npz"


def _line(job: Job, point: Point, judge: Judge) -> str:
    return (
        f"{job.study:10} {job.variant.name:26} seed {job.seed}  step {point.step:6}  {point.seconds:7.1f} s  "
        f"loss {point.loss:.4f}  Fréchet {point.frechet:8.3f} (real {judge.floor:.3f})  "
        f"recognised {point.accuracy:6.1%}"
    )
