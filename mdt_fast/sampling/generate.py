"""From class labels to images: noise, guided steps, pixels or latents."""

import math
import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from ..config import (
    SAMPLERS,
    DiffusionConfig,
    ModelConfig,
    SampleConfig,
    SampleSwitches,
    check_types,
)
from ..diffusion import GaussianDiffusion, make_betas, space_timesteps
from ..errors import UserError, nearest
from .guided import GuidedModel, as_published
from .schedulers import ORDER, SOLVERS, open_scheduler, solver_timesteps

DEFAULT, ALL = SampleConfig(), SampleSwitches()
OnBatch = Callable[[int], None]
OnStep = Callable[[int, int], None]


def sampling_diffusion(
    model: ModelConfig, diffusion: DiffusionConfig, config: SampleConfig
) -> GaussianDiffusion:
    """The diffusion, respaced to ``config.steps`` evenly spread steps of the training process.

    Raises ``UserError`` if ``config.sampler`` does not support that number of steps.
    """
    T = diffusion.diffusion_steps
    return GaussianDiffusion(
        make_betas(diffusion.noise_schedule, T),
        steps_of(config, T),
        mean_type="start_x" if diffusion.predict_xstart else "epsilon",
        var_type="learned_range" if model.learn_sigma else "fixed_large",
        min_snr_gamma=diffusion.min_snr_gamma,
    )


def steps_of(config: SampleConfig, T: int) -> list[int]:
    """The original timesteps (of T) for ``config.steps`` evenly spread steps; ``UserError`` as above."""
    solver = config.sampler in SOLVERS
    lowest, highest = (ORDER, T - 1) if solver else (1, T)
    if type(config.steps) is not int or not lowest <= config.steps <= highest:
        of = f" with {config.sampler}" if solver else ""
        raise UserError(f"steps: got {config.steps!r}, expected {lowest} to {highest}{of}")
    return solver_timesteps(T, config.steps) if solver else space_timesteps(T, config.steps)


def check_sampling(model: ModelConfig, config: SampleConfig) -> None:
    """Raise ``UserError`` for settings that ``sample`` does not support; ``sampling_diffusion`` checks the
    number of ``steps``."""
    if config.sampler not in SAMPLERS:
        raise UserError(
            f"sampler: got {config.sampler!r}{nearest(config.sampler, SAMPLERS)}, "
            f"expected {', '.join(SAMPLERS)}"
        )
    check_types(config)
    for name, lowest, highest in (
        ("num_samples", 1, None), ("batch_size", 1, None), ("seed", 0, None),
        ("cfg_scale", 0, None), ("scale_pow", 0, None), ("eta", 0, 1), ("skip_below", 0, None),
    ):  # fmt: skip
        value = getattr(config, name)
        if value is None or value == "auto":  # scale_pow's
            continue
        if not value >= lowest:
            raise UserError(f"{name}: got {value}, expected {lowest} or more")
        if not math.isfinite(value) or (highest is not None and value > highest):
            allowed = "a finite number" if highest is None else f"at most {highest}"
            raise UserError(f"{name}: got {value}, expected {allowed}")
    if config.sampler != "ddim" and config.eta:
        raise UserError(f"eta: only ddim has one; use 0 with {config.sampler}, got {config.eta:g}")
    if config.cfg_interval is not None:
        low, high = config.cfg_interval
        if not 0 <= low <= high < math.inf:
            raise UserError(f"cfg_interval: got {low:g},{high:g}, expected LOW,HIGH with 0 <= LOW <= HIGH")
    if config.guided_channels is not None and not 1 <= config.guided_channels <= model.in_channels:
        raise UserError(
            f"guided_channels: got {config.guided_channels}, expected None or 1 to {model.in_channels}"
        )
    if config.cfg_scale != 1 and model.class_dropout_prob == 0:
        raise UserError("cfg_scale: a model trained without label dropout cannot be guided; use 1")


def sample(
    model: nn.Module,
    diffusion: GaussianDiffusion | DiffusionConfig,
    labels: Sequence[int],
    config: SampleConfig = DEFAULT,
    *,
    clip_denoised: bool | None = None,
    first_index: int = 0,
    on_batch: OnBatch | None = None,
    on_step: OnStep | None = None,
    switches: SampleSwitches = ALL,
) -> Tensor:
    """Draw one image or latent per label (``config.num_samples`` is for the command only): [N, C, S, S] on
    the CPU, pixels nominally in [-1, 1].

    ``diffusion``: the process the model was trained with, respaced here to ``config.steps`` evenly spread
    steps; one that is already respaced, or of a class of your own, is used as it is. All noise of image i, at
    the start and in every step, comes from a generator seeded by (``config.seed``, ``first_index`` + i). An
    image thus depends neither on its batch (up to rounding in batched products) nor on the process that
    samples it. ``clip_denoised`` clamps the predicted image to [-1, 1], right for pixels and wrong for
    latents; None: clamp if the model has 1 or 3 channels. ``on_batch(done)`` is called with the number of
    finished images, ``on_step(done, total)`` after every step of a batch. The model runs in eval mode, and
    its mode is then restored. The result is float32, or float64 for a float64 model. Raises ``UserError`` for
    labels out of range and impossible settings.
    """
    diffusion = respaced(model, diffusion, config)
    with in_eval(model):
        sampler = Sampler(model, diffusion, config, clip_denoised=clip_denoised, switches=switches)
        return sampler.draw(labels, first_index, on_batch, on_step)


def checked_labels(labels: Sequence[int], num_classes: int) -> list[int]:
    """The labels as Python integers; ``UserError`` if they are not integers or out of range."""
    try:
        found = [operator.index(label) for label in labels]
    except TypeError:
        got = "" if isinstance(labels, Tensor) else f": {labels!r}"
        raise UserError(f"labels: got {type(labels).__name__}{got}, expected a list of integers") from None
    for label in found:
        if not 0 <= label < num_classes:
            raise UserError(f"labels: got {label}, expected 0 to {num_classes - 1}")
    return found


def check_first_index(first_index: int) -> None:
    """Raise ``UserError`` unless this can be the number of an image."""
    if type(first_index) is not int or first_index < 0:
        raise UserError(f"first_index: got {first_index!r}, expected an integer of 0 or more")


@contextmanager
def in_eval(model: nn.Module) -> Iterator[None]:
    """Put ``model`` in eval mode here; afterwards each of its parts gets its own mode back."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def config_of(model: nn.Module) -> ModelConfig:
    """The model's configuration; ``UserError`` for other models than this package's, and for wrapped ones."""
    config = getattr(model, "config", None)
    if config is not None:
        return config
    inside = hasattr(getattr(model, "module", None), "config")
    advice = "pass the model it wraps, its .module" if inside else "this package's models have one"
    raise UserError(f"model: a {type(model).__name__} has no config; {advice}")


def respaced(
    model: nn.Module,
    diffusion: GaussianDiffusion | DiffusionConfig,
    config: SampleConfig,
) -> GaussianDiffusion:
    """The diffusion that ``sample`` was given, respaced. ``UserError`` for other kinds of arguments."""
    if not isinstance(config, SampleConfig):
        raise UserError(f"config: got a {type(config).__name__}, expected a SampleConfig")
    if not isinstance(diffusion, DiffusionConfig) and not hasattr(diffusion, "num_timesteps"):
        raise UserError(
            f"diffusion: got a {type(diffusion).__name__}, expected a GaussianDiffusion or a DiffusionConfig"
        )
    if isinstance(diffusion, DiffusionConfig):
        return sampling_diffusion(config_of(model), diffusion, config)
    if diffusion.num_timesteps != diffusion.original_num_steps or type(diffusion) is not GaussianDiffusion:
        return diffusion
    return GaussianDiffusion(
        diffusion.betas,
        steps_of(config, diffusion.original_num_steps),
        mean_type=diffusion.mean_type,
        var_type=diffusion.var_type,
        loss_type=diffusion.loss_type,
        min_snr_gamma=diffusion.min_snr_gamma,
    )


class Sampler:
    """Draws batches of images, keeping whatever does not depend on the batch between them. Puts the model in
    eval mode."""

    def __init__(
        self,
        model: nn.Module,
        diffusion: GaussianDiffusion,
        config: SampleConfig,
        *,
        clip_denoised: bool | None = None,
        switches: SampleSwitches = ALL,
    ):
        self.about = config_of(model)
        check_sampling(self.about, config)
        config = as_published(config, self.about)
        if next(model.parameters()).device.type == "meta":
            raise UserError("model: its weights are on the meta device, there is nothing to draw with")
        if (diffusion.var_type == "learned_range") != self.about.learn_sigma:
            expected = "learned_range" if self.about.learn_sigma else "fixed_large or fixed_small"
            raise UserError(
                f"diffusion: got var_type {diffusion.var_type}, expected {expected} "
                f"(the model's learn_sigma is {self.about.learn_sigma})"
            )
        if config.sampler in SOLVERS:
            open_scheduler(config.sampler, diffusion)  # fails now if diffusers is missing
        self.diffusion, self.config = diffusion, config
        self.num_classes = int(model.num_classes)  # type: ignore[arg-type]
        C, S = int(model.in_channels), int(model.input_size)  # type: ignore[arg-type]
        self.shape = C, S, S
        self.clip = C in (1, 3) if clip_denoised is None else clip_denoised
        self.model = GuidedModel(model.eval(), diffusion, config, self.clip, switches)
        self.dtype = torch.promote_types(self.model.dtype, torch.float32)

    def draw(
        self,
        labels: Sequence[int],
        first_index: int = 0,
        on_batch: OnBatch | None = None,
        on_step: OnStep | None = None,
    ) -> Tensor:
        """One image per label, drawn batch by batch: [N, C, S, S] on the CPU; see ``sample``."""
        labels = checked_labels(labels, self.num_classes)
        check_first_index(first_index)
        images = []
        for span in self.batches(len(labels)):
            batch = labels[span.start : span.stop]
            images.append(self(batch, first_index + span.start, on_step).cpu())
            if on_batch:
                on_batch(span.stop)
        return torch.cat(images) if images else torch.empty(0, *self.shape)

    def batches(self, count: int) -> Iterator[range]:
        """Which of ``count`` images are drawn together."""
        size = self.config.batch_size
        return (range(start, min(start + size, count)) for start in range(0, count, size))

    @torch.no_grad()
    def __call__(self, labels: Sequence[int], first_index: int = 0, on_step: OnStep | None = None) -> Tensor:
        """Draw one batch: x_0 [n, C, S, S] on the model's device; the seed and ``first_index`` + i determine
        image i.

        ``on_step(done, total)`` is called after each step.
        """
        noise = PerImageNoise(self.config.seed, first_index, len(labels))
        x = noise(torch.empty(len(labels), *self.shape, device=self.model.device, dtype=self.dtype))
        self.model.begin(labels)
        step, T = self._steps(noise), self.diffusion.num_timesteps
        for index in range(T - 1, -1, -1):
            x = step(x, index)
            if on_step:
                on_step(T - index, T)
        return x.clone()  # the next replay of a graph overwrites its memory

    def _steps(self, noise: "PerImageNoise") -> Callable[[Tensor, int], Tensor]:
        """A function from x and a step's index to the next x."""
        model, diffusion, config = self.model, self.diffusion, self.config
        if model.fused:
            noisy = config.sampler == "ddpm" or config.eta > 0
            return lambda x, index: model.step(x, index, noise(x) if noisy else None)
        if config.sampler in SOLVERS:
            solve = open_scheduler(config.sampler, diffusion)
            return lambda x, index: solve(self._pred_xstart(x, index), index, x)

        def separate(x: Tensor, index: int) -> Tensor:
            t = torch.full((len(x),), index, device=x.device)
            given = model.prediction(x, index)
            if config.sampler == "ddpm":
                result = diffusion.p_sample(lambda x, t: given, x, t, self.clip, generator=noise)
            else:
                result = diffusion.ddim_sample(
                    lambda x, t: given, x, t, self.clip, eta=config.eta, generator=noise
                )
            return result["sample"]

        return separate

    def _pred_xstart(self, x: Tensor, index: int) -> Tensor:
        """The predicted x_0, which solvers need; they do not use a learned variance after the C channels."""
        t = torch.full((len(x),), index, device=x.device)
        output = self.model.prediction(x, index)
        return self.diffusion.p_from_output(output, x, t, clip_denoised=self.clip)["pred_xstart"]


class PerImageNoise:
    """Standard normal noise; each image has its own CPU generator, so the noise is the same on every device.

    ``images``: the images' numbers. ``stream``: selects further noise for the same images.
    """

    def __init__(self, seed: int, first_index: int, count: int, *stream: int):
        self.images = range(first_index, first_index + count)
        self.generators = []
        for index in self.images:
            state = np.random.SeedSequence([seed, index], spawn_key=stream).generate_state(1, np.uint64)
            self.generators.append(torch.Generator("cpu").manual_seed(int(state[0])))

    def __call__(self, like: Tensor) -> Tensor:
        """Noise like ``like``; drawn in float32 even if ``like`` is float64."""
        shape, dtype = like.shape[1:], torch.float32  # whatever torch's default is
        drawn = [torch.randn(shape, generator=g, dtype=dtype, device=g.device) for g in self.generators]
        rows = torch.stack(drawn)
        if like.device.type == "cuda":  # the copy overlaps with drawing the next noise
            return rows.pin_memory().to(like.device, like.dtype, non_blocking=True)
        return rows.to(like)
