"""The Gaussian diffusion process: noising q, and the reverse step p defined by a model's output.

``x`` is [B, C, ...] in any float dtype, ``t`` int64 [B] in 0..num_timesteps-1. Every coefficient comes from a
float64 array and is rounded to float32, for float64 ``x`` too, as in the published code.
Source: Ho et al. 2020 equations 4 to 7 and 15; Nichol and Dhariwal 2021 equation 15 (learned variance).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ..errors import UserError, nearest
from .noise import check_same_shape, draw
from .schedule import Array, Schedule

MeanType = Literal["epsilon", "start_x"]
VarType = Literal["learned_range", "fixed_large", "fixed_small"]
LossType = Literal["mse", "rescaled_mse", "rescaled_kl"]
Model = Callable[..., Tensor]
DenoisedFn = Callable[[Tensor], Tensor]


def widened(x: Tensor) -> Tensor:
    """Cast half precision to float32: it cannot resolve the range of variances in which v chooses."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class GaussianProcess(Schedule):
    """A schedule, together with what the model predicts and how the loss is scaled.

    mean_type: the model predicts the noise (``epsilon``) or the clean x (``start_x``).
    var_type: with ``learned_range``, output channels C..2C-1 are v, which places the log variance between the
        posterior's (v = -1) and beta's (v = 1); ``fixed_large`` is beta, ``fixed_small`` the posterior's.
    loss_type and min_snr_gamma: see ``loss.training_losses``.
    """

    def __init__(
        self,
        betas: Array,
        use_timesteps: Sequence[int],
        *,
        mean_type: MeanType = "epsilon",
        var_type: VarType = "learned_range",
        loss_type: LossType = "mse",
        min_snr_gamma: float | None = 5.0,
    ) -> None:
        super().__init__(betas, use_timesteps)
        kinds = {"mean_type": MeanType, "var_type": VarType, "loss_type": LossType}
        for name, value in (("mean_type", mean_type), ("var_type", var_type), ("loss_type", loss_type)):
            if value not in (words := get_args(kinds[name])):
                raise UserError(f"{name}: got {value!r}{nearest(value, words)}, expected {', '.join(words)}")
        self.mean_type = mean_type
        self.var_type = var_type
        self.loss_type = loss_type
        self.min_snr_gamma = min_snr_gamma

    def q_mean_variance(self, x_start: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, variance and log variance of q(x_t | x_0), each shaped like ``x_start``."""
        mean = self.lookup("sqrt_alphas_cumprod", t, x_start) * x_start
        variance = self.lookup("one_minus_alphas_cumprod", t, x_start)
        return mean, variance, self.lookup("log_one_minus_alphas_cumprod", t, x_start)

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor | None = None) -> Tensor:
        """x_t ~ q(x_t | x_0) = sqrt(alphas_cumprod) x_0 + sqrt(1 - alphas_cumprod) noise."""
        if noise is None:
            noise = draw(None, x_start)
        check_same_shape("noise", noise, "x_start", x_start)
        signal = self.lookup("sqrt_alphas_cumprod", t, x_start)
        sigma = self.lookup("sqrt_one_minus_alphas_cumprod", t, x_start)
        return signal * x_start + sigma * noise

    def q_posterior_mean_variance(
        self, x_start: Tensor, x_t: Tensor, t: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, variance and (clipped) log variance of q(x_{t-1} | x_t, x_0), each shaped like ``x_t``."""
        check_same_shape("x_t", x_t, "x_start", x_start)
        variance = self.lookup("posterior_variance", t, x_t)
        log_variance = self.lookup("posterior_log_variance_clipped", t, x_t)
        return self.posterior_mean(x_start, x_t, t), variance, log_variance

    def posterior_mean(self, x_start: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Mean of q(x_{t-1} | x_t, x_0)."""
        coef1 = self.lookup("posterior_mean_coef1", t, x_t)
        coef2 = self.lookup("posterior_mean_coef2", t, x_t)
        return coef1 * x_start + coef2 * x_t

    def predict_xstart(self, x_t: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """Compute x_0 from x_t and its noise."""
        recip = self.lookup("sqrt_recip_alphas_cumprod", t, x_t)
        return recip * x_t - self.lookup("sqrt_recipm1_alphas_cumprod", t, x_t) * eps

    def predict_eps(self, x_t: Tensor, t: Tensor, x_start: Tensor) -> Tensor:
        """Compute the noise in x_t from x_0."""
        recip = self.lookup("sqrt_recip_alphas_cumprod", t, x_t)
        return (recip * x_t - x_start) / self.lookup("sqrt_recipm1_alphas_cumprod", t, x_t)

    def p_mean_variance(
        self,
        model: Model,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: DenoisedFn | None = None,
        model_kwargs: dict[str, Any] | None = None,
    ) -> dict[str, Tensor]:
        """The model's p(x_{t-1} | x_t): ``mean``, ``variance``, ``log_variance`` and ``pred_xstart``, each
        shaped like ``x``.

        The predicted x_0 passes through ``denoised_fn`` and is then, if ``clip_denoised``, clamped to [-1,
        1]. Raises ``UserError`` if ``t`` or the model's output does not fit ``x``.
        """
        output = self.call_model(model, x, t, model_kwargs)
        return self.p_from_output(output, x, t, clip_denoised=clip_denoised, denoised_fn=denoised_fn)

    def call_model(
        self, model: Model, x: Tensor, t: Tensor, model_kwargs: dict[str, Any] | None = None
    ) -> Tensor:
        """``model(x, original timesteps, **model_kwargs)``; the output must be [B, 2C or C, ...]."""
        self.check_timesteps(t, x)
        if model_kwargs is not None and not isinstance(model_kwargs, Mapping):
            got = type(model_kwargs).__name__
            raise UserError(f'model_kwargs: got a {got}, expected a dict such as {{"y": labels}}')
        return self.checked(model(x, self.original_timesteps(t), **(model_kwargs or {})), x)

    def checked(self, output: Tensor, x: Tensor) -> Tensor:
        """Return a model's ``output`` for ``x`` if its shape is right: [B, 2C or C, ...]."""
        factor = 2 if self.var_type == "learned_range" else 1
        expected = (x.shape[0], factor * x.shape[1], *x.shape[2:])
        if not isinstance(output, Tensor) or output.shape != expected:
            got = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
            rule = "twice the channels of x with learn_sigma" if factor == 2 else "that of x"
            raise UserError(f"model: got {got}, expected output {list(expected)} ({rule})")
        return output

    def p_from_output(
        self,
        output: Tensor,
        x: Tensor,
        t: Tensor,
        *,
        clip_denoised: bool = True,
        denoised_fn: DenoisedFn | None = None,
    ) -> dict[str, Tensor]:
        """``p_mean_variance`` from an ``output`` that the model has already computed."""
        output, x = widened(output), widened(x)
        if self.var_type == "learned_range":
            output, v = output.chunk(2, dim=1)
            lower = self.lookup("posterior_log_variance_clipped", t, x)
            upper = self.lookup("log_betas", t, x)
            fraction = (v + 1) / 2  # v is intended to be in [-1, 1], but this is not enforced
            log_variance = fraction * upper + (1 - fraction) * lower
            variance = log_variance.exp()
        elif self.var_type == "fixed_large":
            variance = self.lookup("fixed_large_variance", t, x)
            log_variance = self.lookup("fixed_large_log_variance", t, x)
        else:
            variance = self.lookup("posterior_variance", t, x)
            log_variance = self.lookup("posterior_log_variance_clipped", t, x)

        pred_xstart = output if self.mean_type == "start_x" else self.predict_xstart(x, t, output)
        if denoised_fn is not None:
            pred_xstart = denoised_fn(pred_xstart)
        if clip_denoised:
            pred_xstart = pred_xstart.clamp(-1, 1)
        mean = self.posterior_mean(pred_xstart, x, t)
        return {"mean": mean, "variance": variance, "log_variance": log_variance, "pred_xstart": pred_xstart}
