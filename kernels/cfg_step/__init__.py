"""A guided sampling step: guidance, variance, posterior mean and noise in one kernel."""

from .coefficients import ddim_coefficients, ddpm_coefficients
from .op import cfg_step

__all__ = ["cfg_step", "ddim_coefficients", "ddpm_coefficients"]
