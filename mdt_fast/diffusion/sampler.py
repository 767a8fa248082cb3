"""From noise to samples: ancestral steps (DDPM), DDIM steps and reverse DDIM steps.

Every step draws one noise tensor, even the last one and even for eta = 0, where it is not used: a seed then
gives the same samples as in the published code. Loops run under ``no_grad``; the model must already be in
eval mode.
Source: Ho et al. 2020 algorithm 2; Song et al. 2021 (DDIM) equations 12 and 16;
Dhariwal and Nichol 2021 algorithms 1 and 2 (``cond_fn``).
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from .noise import NoiseSource, check_same_shape, draw, draw_shape
from .process import DenoisedFn, GaussianProcess, Model

CondFn = Callable[..., Tensor]
Step = Callable[[Tensor, Tensor], dict[str, Tensor]]


def p_sample(
    diffusion: GaussianProcess,
    model: Model,
    x: Tensor,
    t: Tensor,
    clip_denoised: bool = True,
    denoised_fn: DenoisedFn | None = None,
    cond_fn: CondFn | None = None,
    model_kwargs: dict[str, Any] | None = None,
    *,
    generator: NoiseSource = None,
) -> dict[str, Tensor]:
    """One ancestral step: ``sample`` = x_{t-1} ~ p(x_{t-1} | x_t) and ``pred_xstart``, both like ``x``.

    ``cond_fn(x, original t, **model_kwargs)`` is the gradient of log p(y | x). It is multiplied by the
    variance and added to the mean.
    """
    p = diffusion.p_mean_variance(model, x, t, clip_denoised, denoised_fn, model_kwargs)
    noise = draw(generator, x)
    mean = p["mean"]
    if cond_fn is not None:
        mean = mean + p["variance"] * _gradient(diffusion, cond_fn, x, t, model_kwargs)
    sample = mean + _unless_last(t, x) * (0.5 * p["log_variance"]).exp() * noise
    return {"sample": sample, "pred_xstart": p["pred_xstart"]}


def ddim_sample(
    diffusion: GaussianProcess,
    model: Model,
    x: Tensor,
    t: Tensor,
    clip_denoised: bool = True,
    denoised_fn: DenoisedFn | None = None,
    cond_fn: CondFn | None = None,
    model_kwargs: dict[str, Any] | None = None,
    eta: float = 0.0,
    *,
    generator: NoiseSource = None,
) -> dict[str, Tensor]:
    """One DDIM step: ``sample`` and ``pred_xstart``, like ``x``. ``eta`` 0 is deterministic, 1 uses DDPM's
    posterior variance."""
    if not 0 <= eta <= 1:
        raise UserError(f"eta: got {eta}, expected 0 to 1")
    pred_xstart = _pred_xstart(diffusion, model, x, t, clip_denoised, denoised_fn, cond_fn, model_kwargs)
    eps = diffusion.predict_eps(x, t, pred_xstart)  # from the clipped x_0
    signal = diffusion.lookup("alphas_cumprod", t, x)
    signal_prev = diffusion.lookup("alphas_cumprod_prev", t, x)
    sigma = eta * ((1 - signal_prev) / (1 - signal)).sqrt() * (1 - signal / signal_prev).sqrt()
    noise = draw(generator, x)
    # With eta = 1 and a large stride the difference can round to just below 0.
    direction = (1 - signal_prev - sigma**2).clamp(min=0).sqrt()
    mean = pred_xstart * signal_prev.sqrt() + direction * eps
    return {"sample": mean + _unless_last(t, x) * sigma * noise, "pred_xstart": pred_xstart}


def ddim_reverse_sample(
    diffusion: GaussianProcess,
    model: Model,
    x: Tensor,
    t: Tensor,
    clip_denoised: bool = True,
    denoised_fn: DenoisedFn | None = None,
    cond_fn: CondFn | None = None,
    model_kwargs: dict[str, Any] | None = None,
    eta: float = 0.0,
) -> dict[str, Tensor]:
    """One deterministic DDIM step towards noise: ``sample`` = x_{t+1} and ``pred_xstart``. ``eta`` must be
    0."""
    if eta != 0:
        raise UserError(f"eta: reverse DDIM exists for 0 only, got {eta}")
    pred_xstart = _pred_xstart(diffusion, model, x, t, clip_denoised, denoised_fn, cond_fn, model_kwargs)
    eps = diffusion.predict_eps(x, t, pred_xstart)
    signal_next = diffusion.lookup("alphas_cumprod_next", t, x)
    sample = pred_xstart * signal_next.sqrt() + (1 - signal_next).sqrt() * eps
    return {"sample": sample, "pred_xstart": pred_xstart}


def p_sample_loop_progressive(
    diffusion: GaussianProcess,
    model: Model,
    shape: Sequence[int],
    noise: Tensor | None = None,
    clip_denoised: bool = True,
    denoised_fn: DenoisedFn | None = None,
    cond_fn: CondFn | None = None,
    model_kwargs: dict[str, Any] | None = None,
    device: torch.device | str | None = None,
    progress: bool = False,
    *,
    generator: NoiseSource = None,
) -> Iterator[dict[str, Tensor]]:
    """``p_sample`` from the last t down to 0, yielding each step's result. Arguments of ``p_sample_loop``."""

    called = in_a_loop(model, diffusion.num_timesteps)

    def step(x: Tensor, t: Tensor) -> dict[str, Tensor]:
        return p_sample(
            diffusion, called, x, t, clip_denoised, denoised_fn, cond_fn, model_kwargs, generator=generator
        )

    x = _initial_noise(model, shape, noise, device, generator)
    return _steps(step, x, diffusion.num_timesteps, progress)


def p_sample_loop(
    diffusion: GaussianProcess,
    model: Model,
    shape: Sequence[int],
    noise: Tensor | None = None,
    clip_denoised: bool = True,
    denoised_fn: DenoisedFn | None = None,
    cond_fn: CondFn | None = None,
    model_kwargs: dict[str, Any] | None = None,
    device: torch.device | str | None = None,
    progress: bool = False,
    *,
    generator: NoiseSource = None,
) -> Tensor:
    """Samples of ``shape`` [B, C, ...] by ancestral sampling.

    model: called as ``model(x, original t, **model_kwargs)``; a module, a bound method such as
        ``module.forward_with_cfg``, or any function. On a GPU, each step of a model of this package is a CUDA
        graph (:func:`in_a_loop`).
    noise: x_T, of ``shape``; drawn if None.
    clip_denoised: clamp the predicted x_0 to [-1, 1]: right for pixels, wrong for latents.
    denoised_fn, cond_fn: hooks on the predicted x_0 (``p_mean_variance``) and on the mean (``p_sample``).
    device: where to sample; None: the device of ``noise``, or else of the model's parameters.
    progress: show a progress bar.
    generator: the source of x_T and of each step's noise (``NoiseSource``).
    """
    for result in p_sample_loop_progressive(
        diffusion, model, shape, noise, clip_denoised, denoised_fn, cond_fn, model_kwargs, device, progress,
        generator=generator,
    ):  # fmt: skip
        sample = result["sample"]
    return sample


def ddim_sample_loop_progressive(
    diffusion: GaussianProcess,
    model: Model,
    shape: Sequence[int],
    noise: Tensor | None = None,
    clip_denoised: bool = True,
    denoised_fn: DenoisedFn | None = None,
    cond_fn: CondFn | None = None,
    model_kwargs: dict[str, Any] | None = None,
    device: torch.device | str | None = None,
    progress: bool = False,
    eta: float = 0.0,
    *,
    generator: NoiseSource = None,
) -> Iterator[dict[str, Tensor]]:
    """``ddim_sample`` from the last t down to 0, yielding each step's result; see ``ddim_sample_loop``."""

    called = in_a_loop(model, diffusion.num_timesteps)

    def step(x: Tensor, t: Tensor) -> dict[str, Tensor]:
        return ddim_sample(
            diffusion, called, x, t, clip_denoised, denoised_fn, cond_fn, model_kwargs, eta,
            generator=generator,
        )  # fmt: skip

    x = _initial_noise(model, shape, noise, device, generator)
    return _steps(step, x, diffusion.num_timesteps, progress)


def ddim_sample_loop(
    diffusion: GaussianProcess,
    model: Model,
    shape: Sequence[int],
    noise: Tensor | None = None,
    clip_denoised: bool = True,
    denoised_fn: DenoisedFn | None = None,
    cond_fn: CondFn | None = None,
    model_kwargs: dict[str, Any] | None = None,
    device: torch.device | str | None = None,
    progress: bool = False,
    eta: float = 0.0,
    *,
    generator: NoiseSource = None,
) -> Tensor:
    """Samples of ``shape`` by DDIM. Arguments of ``p_sample_loop``, and ``eta`` of ``ddim_sample``."""
    for result in ddim_sample_loop_progressive(
        diffusion, model, shape, noise, clip_denoised, denoised_fn, cond_fn, model_kwargs, device, progress,
        eta, generator=generator,
    ):  # fmt: skip
        sample = result["sample"]
    return sample


def _steps(step: Step, x: Tensor, num_timesteps: int, progress: bool) -> Iterator[dict[str, Tensor]]:
    indices: Iterable[int] = range(num_timesteps - 1, -1, -1)
    if progress:
        from rich.progress import track

        indices = track(indices, description="sampling", total=num_timesteps)
    for index in indices:
        with torch.no_grad():  # around the step only: a generator must not change its caller's grad mode
            result = step(x, torch.full(x.shape[:1], index, device=x.device))
        yield result
        x = result["sample"]


def in_a_loop(model: Model, calls: int) -> Model:
    """``model``, prepared for a loop that calls it ``calls`` times. A module's class may have a method
    ``in_a_loop(model, calls)`` that returns a faster form of ``model`` (the module or one of its methods)."""
    owner = getattr(model, "__self__", model)
    quicker = getattr(type(owner), "in_a_loop", None)
    return model if quicker is None else quicker(owner, model, calls)


def _initial_noise(
    model: Model,
    shape: Sequence[int],
    noise: Tensor | None,
    device: torch.device | str | None,
    generator: NoiseSource,
) -> Tensor:
    """x_T on the device given by ``device``, ``noise`` or the model's parameters, in that order."""
    if noise is not None:
        if tuple(noise.shape) != tuple(shape):
            raise UserError(f"noise: got {list(noise.shape)}, expected shape {list(shape)}")
        return noise if device is None else noise.to(device)
    if device is None:
        module: Any = getattr(model, "__self__", model)  # the module of a bound method
        modular = isinstance(module, torch.nn.Module) or hasattr(type(module), "in_a_loop")
        parameter = next(module.parameters(), None) if modular else None
        if parameter is None:
            raise UserError("device: must be given if there is neither noise nor a model with parameters")
        device = parameter.device
    return draw_shape(generator, shape, torch.device(device))


def _pred_xstart(
    diffusion: GaussianProcess,
    model: Model,
    x: Tensor,
    t: Tensor,
    clip_denoised: bool,
    denoised_fn: DenoisedFn | None,
    cond_fn: CondFn | None,
    model_kwargs: dict[str, Any] | None,
) -> Tensor:
    """Predicted x_0; with ``cond_fn``, computed from noise shifted by -sqrt(1 - alphas_cumprod) times the
    gradient."""
    pred_xstart = diffusion.p_mean_variance(model, x, t, clip_denoised, denoised_fn, model_kwargs)[
        "pred_xstart"
    ]
    if cond_fn is None:
        return pred_xstart
    gradient = _gradient(diffusion, cond_fn, x, t, model_kwargs)
    sigma = diffusion.lookup("sqrt_one_minus_alphas_cumprod", t, x)
    eps = diffusion.predict_eps(x, t, pred_xstart) - sigma * gradient
    return diffusion.predict_xstart(x, t, eps)


def _gradient(
    diffusion: GaussianProcess, cond_fn: CondFn, x: Tensor, t: Tensor, model_kwargs: dict[str, Any] | None
) -> Tensor:
    gradient = cond_fn(x, diffusion.original_timesteps(t), **(model_kwargs or {}))
    check_same_shape("cond_fn", gradient, "x", x)
    return gradient


def _unless_last(t: Tensor, x: Tensor) -> Tensor:
    """1 where t > 0 and 0 at t = 0, [B, 1, ...] in ``x``'s dtype."""
    return (t != 0).to(x.dtype).view(-1, *[1] * (x.ndim - 1))
