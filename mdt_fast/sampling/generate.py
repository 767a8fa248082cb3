"""From class labels to images: noise, guided sampler, pixels in [-1, 1]."""

import math
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from ..config import DiffusionConfig, ModelConfig, SampleConfig
from ..diffusion import GaussianDiffusion, create_diffusion
from ..errors import UserError

OnBatch = Callable[[int], None]


def sampling_diffusion(
    model: ModelConfig, diffusion: DiffusionConfig, config: SampleConfig
) -> GaussianDiffusion:
    """The diffusion respaced to ``config.steps`` evenly spread steps of the training process."""
    if not 1 <= config.steps <= diffusion.diffusion_steps:
        raise UserError(f"steps: allowed are 1 to {diffusion.diffusion_steps}, got {config.steps}")
    return create_diffusion(
        str(config.steps),
        noise_schedule=diffusion.noise_schedule,
        predict_xstart=diffusion.predict_xstart,
        learn_sigma=model.learn_sigma,
        diffusion_steps=diffusion.diffusion_steps,
        min_snr_gamma=diffusion.min_snr_gamma,
    )


def check_sampling(model: ModelConfig, config: SampleConfig) -> None:
    """``UserError`` for settings that ``sample`` cannot follow; ``sampling_diffusion`` checks ``steps``."""
    for name, lowest, highest in (
        ("num_samples", 1, None), ("batch_size", 1, None), ("seed", 0, None),
        ("cfg_scale", 0, None), ("scale_pow", 0, None), ("eta", 0, 1),
    ):  # fmt: skip
        value = getattr(config, name)
        if value is None:  # no power: constant guidance
            continue
        if not value >= lowest:
            raise UserError(f"{name}: must be at least {lowest}, got {value}")
        if not math.isfinite(value) or (highest is not None and value > highest):
            raise UserError(
                f"{name}: must be {'finite' if highest is None else f'at most {highest}'}, got {value}"
            )
    if config.cfg_scale != 1 and model.class_dropout_prob == 0:
        raise UserError("cfg_scale: a model trained without label dropout cannot be guided; use 1")


def sample(
    model: nn.Module,
    diffusion: GaussianDiffusion,
    labels: Sequence[int],
    config: SampleConfig,
    *,
    diffusion_steps: int = 1000,
    clip_denoised: bool = True,
    first_index: int = 0,
    on_batch: OnBatch | None = None,
) -> Tensor:
    """One image per label: [N, C, S, S] float32 on the CPU, nominally in [-1, 1].

    Guidance is ``model.forward_with_cfg`` (``cfg_scale`` 1: the plain conditional model). All noise of
    image i, the start and what the steps add, comes from a generator seeded by (``config.seed``,
    ``first_index`` + i): a picture does not depend on the batch it is drawn in (up to rounding in the
    batched products). ``clip_denoised`` clamps the predicted image to [-1, 1], right for pixels and wrong
    for latents. ``on_batch`` hears how many images are done. The model is put in eval mode. Raises
    ``UserError`` for labels out of range and impossible settings.
    """
    num_classes = int(model.num_classes)  # type: ignore[arg-type]
    for label in labels:
        if not 0 <= label < num_classes:
            raise UserError(f"labels: allowed are 0 to {num_classes - 1}, got {label}")
    check_sampling(model.config, config)  # type: ignore[arg-type]
    model.eval()
    device = next(model.parameters()).device
    shape = int(model.in_channels), int(model.input_size), int(model.input_size)  # type: ignore[arg-type]
    images = []
    for start in range(0, len(labels), config.batch_size):
        y = torch.tensor(labels[start : start + config.batch_size], device=device)
        noise = _PerImageNoise(config.seed, first_index + start, len(y))
        loop = diffusion.p_sample_loop
        if config.sampler == "ddim":
            loop = partial(diffusion.ddim_sample_loop, eta=config.eta)
        guided = _guided(model, y, config, diffusion_steps)
        x_T = noise(torch.empty(len(y), *shape, device=device))
        images.append(loop(guided, x_T.shape, x_T, clip_denoised, generator=noise).cpu())
        if on_batch:
            on_batch(start + len(y))
    return torch.cat(images) if images else torch.empty(0, *shape)


def _guided(model: nn.Module, y: Tensor, config: SampleConfig, diffusion_steps: int) -> Callable[..., Tensor]:
    """The model as the sampler calls it, n rows in and out; guidance doubles them inside."""
    if config.cfg_scale == 1:
        return lambda x, t: model(x, t, y)
    null = torch.full_like(y, int(model.num_classes))  # type: ignore[arg-type]
    labels = torch.cat([y, null])

    def guided(x: Tensor, t: Tensor) -> Tensor:
        both = model.forward_with_cfg(  # type: ignore[operator]
            torch.cat([x, x]),
            torch.cat([t, t]),
            labels,
            cfg_scale=config.cfg_scale,
            diffusion_steps=diffusion_steps,
            scale_pow=config.scale_pow,
        )
        return both[: len(x)]

    return guided


class _PerImageNoise:
    """Standard normal noise, each image from its own generator, on the CPU: the same on every device."""

    def __init__(self, seed: int, first_index: int, count: int):
        self.generators = []
        for index in range(first_index, first_index + count):
            state = np.random.SeedSequence([seed, index]).generate_state(1, np.uint64)
            self.generators.append(torch.Generator().manual_seed(int(state[0])))

    def __call__(self, like: Tensor) -> Tensor:
        rows = [torch.randn(like.shape[1:], generator=generator) for generator in self.generators]
        return torch.stack(rows).to(like)
