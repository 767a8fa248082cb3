"""Diffusers' schedulers: make one with the published noise schedule, and prepare any of them for sampling."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..config import DiffusionConfig, SamplerName
from ..diffusion import make_betas, space_timesteps
from ..errors import UserError, one_line
from ..sampling.schedulers import SOLVERS

CLASSES = {"ddpm": "DDPMScheduler", "ddim": "DDIMScheduler", **SOLVERS}
LEARNED = ("learned", "learned_range")
ANCESTRAL = ("DDPMScheduler", "DDPMParallelScheduler")
MULTISTEP = ("DPMSolverMultistepScheduler", "DEISMultistepScheduler", "UniPCMultistepScheduler")
DDIM = ("DDIMScheduler", "DDIMParallelScheduler")


def published_scheduler(
    diffusion: DiffusionConfig, *, learn_sigma: bool = True, clip: bool = False, sampler: SamplerName = "ddpm"
) -> Any:
    """The scheduler for a model trained with ``diffusion``: ``mdt_fast.sample``'s ``sampler`` and timesteps.

    ``learn_sigma``: the model predicts its variance. ``clip``: clamp predicted images to [-1, 1], which is
    right for pixels. Any scheduler made from this one by ``from_config`` keeps the noise schedule and the
    timesteps, which are spread evenly from the first to the last (``linspace``), as in the published
    respacing.
    """
    import diffusers

    betas = make_betas(diffusion.noise_schedule, diffusion.diffusion_steps)
    scheduler = diffusers.DDPMScheduler(
        num_train_timesteps=len(betas),
        beta_start=float(betas[0]),
        beta_end=float(betas[-1]),
        beta_schedule=diffusion.noise_schedule,
        prediction_type="sample" if diffusion.predict_xstart else "epsilon",
        variance_type="learned_range" if learn_sigma else "fixed_large",
        clip_sample=clip,
        timestep_spacing="linspace",
    )
    # The solvers have no clip_sample, but their thresholding with a maximum of 1 is a clamp.
    clamp = {"thresholding": True, "sample_max_value": 1.0} if clip and sampler in SOLVERS else {}
    return getattr(diffusers, CLASSES[sampler]).from_config(scheduler.config, **clamp)


@dataclass(frozen=True)
class Ready:
    """A scheduler with its ``timesteps`` set, from noise to images, in its own numbering.

    ``times``: the original timesteps at which the model is called, in the same order. ``takes_variance``:
    the scheduler also takes the model's variance.
    """

    scheduler: Any
    times: Sequence[float]
    takes_variance: bool

    @property
    def timesteps(self) -> Tensor:
        return self.scheduler.timesteps


def ready(scheduler: Any, steps: int, device: torch.device, learn_sigma: bool) -> Ready:
    """Prepare ``scheduler`` for ``steps`` steps. Raises ``UserError`` if it cannot be used with these models.

    The scheduler itself is used, except in two cases. DDIM always steps back by ``num_train_timesteps //
    steps``, and would miss the timesteps of ``linspace``: a copy gets only the noise levels of those
    timesteps, as if no others had been trained. Solvers whose config has DDPM's learned variance would cut
    the noise to three channels: a copy gets no learned variance. For DDPM and DDIM, ``linspace`` is the
    published respacing, which rounds a few halves the other way than diffusers.
    """
    name, config = type(scheduler).__name__, scheduler.config
    kinds = {cls.__name__ for cls in type(scheduler).__mro__}
    kind = config.get("prediction_type")
    if kind not in ("epsilon", "sample"):
        raise UserError(f"scheduler: {name} predicts {kind!r}; the models predict 'epsilon' or 'sample'")
    if kind == "epsilon" and config.get("rescale_betas_zero_snr"):
        raise UserError(
            f"scheduler: {name} has rescale_betas_zero_snr=True: its first step starts from pure noise, "
            "from which predicted noise ('epsilon') gives no image; use False"
        )
    total = config.num_train_timesteps
    if isinstance(steps, bool) or not isinstance(steps, int | np.integer) or not 1 <= steps <= total:
        raise UserError(f"num_inference_steps: got {steps!r}, expected 1 to {total}")
    steps = int(steps)
    learned = config.get("variance_type") in LEARNED
    takes_variance = learned and not kinds.isdisjoint(ANCESTRAL)
    if takes_variance and (not learn_sigma or config.variance_type == "learned"):
        has = "learn its range (learned_range)" if learn_sigma else "do not learn it (learn_sigma=False)"
        raise UserError(f"scheduler: variance_type is {config.variance_type!r}, models of this kind {has}")
    if learned and not takes_variance:
        scheduler = type(scheduler).from_config(config, variance_type=None)
    if config.get("timestep_spacing") == "linspace" and not kinds.isdisjoint(ANCESTRAL + DDIM):
        spaced = space_timesteps(total, steps)[::-1]
        if not kinds.isdisjoint(DDIM):
            return Ready(_respaced(scheduler, spaced, device), spaced, takes_variance)
        scheduler.set_timesteps(timesteps=spaced, device=device)
        return Ready(scheduler, spaced, takes_variance)
    try:
        scheduler.set_timesteps(steps, device=device)
    except (ValueError, IndexError) as error:
        reason = one_line(error)
        raise UserError(f"num_inference_steps: {name} cannot take {steps}: {reason}") from None
    times = scheduler.timesteps.tolist()
    if not kinds.isdisjoint(MULTISTEP) and scheduler.config.solver_order > 1:
        levels = scheduler.sigmas[:-1]
        if len(levels.unique()) < len(levels) or times[:1] == times[1:2]:
            raise UserError(
                f"num_inference_steps: got {steps}, expected fewer: {name} would take a noise level twice, "
                "which it cannot"
            )
    if not 0 <= min(times) <= max(times) < total:
        raise UserError(
            f"scheduler: {name} uses timesteps {min(times):g} to {max(times):g}, expected 0 to {total - 1}"
        )
    return Ready(scheduler, times, takes_variance)


def _respaced(scheduler: Any, times: list[int], device: torch.device) -> Any:
    """``times``: from noise to images."""
    respaced = type(scheduler).from_config(
        scheduler.config, num_train_timesteps=len(times), timestep_spacing="leading", steps_offset=0
    )
    respaced.alphas_cumprod = scheduler.alphas_cumprod[times[::-1]]
    respaced.final_alpha_cumprod = scheduler.final_alpha_cumprod
    respaced.set_timesteps(len(times), device=device)
    return respaced
