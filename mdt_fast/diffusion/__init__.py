"""Gaussian diffusion for MDT and DiT: schedules, losses and samplers, with the published code's names.

``schedule.py`` has the arrays, ``process.py`` the distributions q and p, ``loss.py`` the objective,
``sampler.py`` the loops from noise to samples, ``guidance.py`` classifier-free guidance and ``timesteps.py``
the choice of timesteps in training.
"""

import torch

from ..errors import UserError
from . import loss, sampler
from .guidance import channels_to_guide, guide, power_cosine_scale
from .noise import NoiseSource
from .process import GaussianProcess, LossType, VarType
from .schedule import Respacing, make_betas, space_timesteps
from .timesteps import LossSecondMomentSampler, UniformSampler

__all__ = [
    "GaussianDiffusion",
    "LossSecondMomentSampler",
    "NoiseSource",
    "UniformSampler",
    "channels_to_guide",
    "create_diffusion",
    "guide",
    "make_betas",
    "power_cosine_scale",
    "space_timesteps",
]


class GaussianDiffusion(GaussianProcess):
    """A diffusion process with its losses and samplers as methods; made by ``create_diffusion``.

    Models are called with the original timesteps (``timestep_map``), so a model trained on 1000 steps can
    sample in 50.
    """

    training_losses = loss.training_losses
    two_pass_losses = loss.two_pass_losses
    calc_bpd_loop = loss.calc_bpd_loop
    prior_bpd = loss.prior_bpd

    p_sample = sampler.p_sample
    p_sample_loop = sampler.p_sample_loop
    p_sample_loop_progressive = sampler.p_sample_loop_progressive

    ddim_sample = sampler.ddim_sample
    ddim_reverse_sample = sampler.ddim_reverse_sample
    ddim_sample_loop = sampler.ddim_sample_loop
    ddim_sample_loop_progressive = sampler.ddim_sample_loop_progressive


def create_diffusion(
    timestep_respacing: Respacing = None,
    noise_schedule: str = "linear",
    use_kl: bool = False,
    sigma_small: bool = False,
    predict_xstart: bool = False,
    learn_sigma: bool = True,
    rescale_learned_sigmas: bool = False,
    diffusion_steps: int = 1000,
    *,
    min_snr_gamma: float | None = 5.0,
) -> GaussianDiffusion:
    """The process for a model trained with ``diffusion_steps`` steps.

    timestep_respacing: the steps to use for sampling: "" or None (all), "250", "ddim50", "10,15,20"
        (``space_timesteps``).
    noise_schedule: ``linear`` or ``squaredcos_cap_v2``.
    predict_xstart: the model predicts x_0 instead of the noise.
    learn_sigma: the model also predicts its variance. Otherwise the variance is fixed: beta, or the
        posterior's with ``sigma_small``.
    use_kl, rescale_learned_sigmas: train on the bound alone, or rescale it when added to the squared error
        (``loss.training_losses``).
    min_snr_gamma: cap of the signal-to-noise ratio in the loss weight; 5 as in MDTv2, None (weight 1) as in
        MDT v1 and DiT.

    Raises ``UserError`` for an unknown schedule and for an impossible respacing.
    """
    if min_snr_gamma is not None and not 0 < min_snr_gamma <= torch.finfo(torch.float32).max:
        raise UserError(f"min_snr_gamma: got {min_snr_gamma}, expected None or above 0, and a float32")
    loss_type: LossType = "rescaled_kl" if use_kl else "rescaled_mse" if rescale_learned_sigmas else "mse"
    var_type: VarType = "learned_range" if learn_sigma else "fixed_small" if sigma_small else "fixed_large"
    return GaussianDiffusion(
        make_betas(noise_schedule, diffusion_steps),
        space_timesteps(diffusion_steps, timestep_respacing),
        mean_type="start_x" if predict_xstart else "epsilon",
        var_type=var_type,
        loss_type=loss_type,
        min_snr_gamma=min_snr_gamma,
    )
