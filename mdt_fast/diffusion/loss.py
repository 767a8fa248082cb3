"""The training objective: weighted squared error, plus the variational bound that teaches the variance.

All values are [B] float tensors; bounds are in bits per dimension (mean over all but the batch, over ln 2).
Source: Ho et al. 2020 equations 5, 13 and 14; Nichol and Dhariwal 2021 section 3.1 (hybrid loss);
Hang et al. 2023 (min-SNR weights).
"""

import inspect
import math
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from .noise import NoiseSource, draw
from .process import GaussianProcess, Model, widened
from .sampler import in_a_loop

STEP = "training_step_outputs"


def training_losses(
    diffusion: GaussianProcess,
    model: Model,
    x_start: Tensor,
    t: Tensor,
    model_kwargs: dict[str, Any] | None = None,
    noise: Tensor | None = None,
) -> dict[str, Tensor]:
    """Loss of every sample and its parts: ``loss`` = ``mse`` + ``vb``, each [B].

    ``mse`` compares the model's prediction with the noise (or x_0), times ``min_snr_weight``. ``vb`` trains
    only the variance: the prediction in it is detached. It is absent with a fixed variance, and scaled by
    num_timesteps / 1000 for ``rescaled_mse``. ``rescaled_kl`` has only ``loss``: num_timesteps times the
    bound, with nothing detached. ``noise`` is drawn if it is None.
    """
    if noise is None:
        noise = draw(None, x_start)
    x_t = diffusion.q_sample(x_start, t, noise)
    output = diffusion.call_model(model, x_t, t, model_kwargs)
    return losses_from_output(diffusion, output, x_start, x_t, t, noise)


def two_pass_losses(
    diffusion: GaussianProcess,
    model: Any,
    x_start: Tensor,
    t: Tensor,
    y: Tensor,
    y_masked: Tensor | None = None,
    *,
    noise: Tensor | None = None,
    noise_masked: Tensor | None = None,
    mask_plan: Any = None,
) -> dict[str, Tensor]:
    """MDT's objective: the terms of :func:`training_losses` over all tokens and, as ``m_...``, those of the
    masked pass; each [B].

    Both passes share ``x_start``, ``t`` and ``y``; noise, label drops and the mask are newly drawn unless
    given. With ``y_masked``, the labels of the masked pass, no labels are dropped. Both passes run as one
    batch. Random draws have the order of two separate passes, so every number drawn on a CPU is the same.

    ``model``: an MDT of this package, or a wrapper that calls its forward: ``DistributedDataParallel``, FSDP,
    accelerate, ``torch.compile``. It is called once, as ``model(x_full, t, y, x_masked=...)``; if its
    ``training_step_outputs`` is an instance attribute (FSDP2's ``register_fsdp_forward_method``,
    ``compile_for_training``), that is called instead. A class with its own forward must name the keywords
    ``x_masked``, ``y_masked`` and ``mask_plan``; labels have been dropped before it is called, unless the
    embedder drops them by itself (``y_masked`` is None then). Raises ``UserError`` for other models, and if y
    is not a batch of labels.
    """
    diffusion.check_timesteps(t, x_start)
    mdt = _unwrapped(model)
    _check_two_passes(mdt, x_start, y)
    drop = mdt.drop_labels if y_masked is None else _as_it_is
    noise, y_full = draw(None, x_start) if noise is None else noise, drop(y)
    noise_masked = draw(None, x_start) if noise_masked is None else noise_masked
    if y_masked is not None or not (mdt.training and getattr(mdt, "drops_by_itself", False)):
        y_masked = drop(y if y_masked is None else y_masked)
    x_full, x_masked = (diffusion.q_sample(x_start, t, n) for n in (noise, noise_masked))
    times = diffusion.original_timesteps(t)
    plan = mdt.draw_plan(len(t), x_start.device) if mask_plan is None else mask_plan
    if model is mdt and STEP in vars(mdt):
        outputs = mdt.training_step_outputs(x_full, x_masked, times, y_full, y_masked, plan)
    else:
        outputs = model(x_full, times, y_full, mask_plan=plan, x_masked=x_masked, y_masked=y_masked)
    if not isinstance(outputs, tuple | list) or len(outputs) != 2:
        got = list(outputs.shape) if isinstance(outputs, Tensor) else f"a {type(outputs).__name__}"
        raise UserError(f"model: got {got}, expected both passes' outputs where x_masked is given")
    full, masked = (
        losses_from_output(diffusion, diffusion.checked(output, x), x_start, x, t, n)
        for output, x, n in zip(outputs, (x_full, x_masked), (noise, noise_masked), strict=True)
    )
    return full | {f"m_{name}": values for name, values in masked.items()}


def _unwrapped(model: Any) -> Any:
    """The MDT in ``model``, by the attributes under which wrappers keep it. Some wrappers forward all
    attributes, so the class decides."""
    inner = getattr(model, "_orig_mod", model)
    while not hasattr(type(inner), STEP) and STEP not in getattr(inner, "__dict__", ()):
        if not hasattr(inner, "module"):
            within = "" if inner is model else f" (in a {type(model).__name__})"
            raise UserError(
                f"model: a {type(inner).__name__}{within} has no {STEP}; only MDT and MDTv2 have a masked "
                "pass (in a wrapper, its .module is looked up); use training_losses for others"
            )
        inner = getattr(inner.module, "_orig_mod", inner.module)
    return inner


def _check_two_passes(mdt: Any, x_start: Tensor, y: Any) -> None:
    named = inspect.signature(mdt.forward).parameters
    lacking = [name for name in ("x_masked", "y_masked", "mask_plan") if name not in named]
    if lacking and STEP not in vars(mdt):
        whose = "a replaced forward" if "forward" in vars(mdt) else "a forward of its own"
        raise UserError(
            f"model: {type(mdt).__name__} has {whose}, without the keyword {' or '.join(lacking)}; give it "
            "x_masked, y_masked and mask_plan, with both outputs there, or take training_losses twice"
        )
    labels = getattr(mdt, "takes_labels", True)
    if not isinstance(y, Tensor) or y.shape[: None if labels else 1] != x_start.shape[:1]:
        got = list(y.shape) if isinstance(y, Tensor) else f"a {type(y).__name__}"
        raise UserError(f"y: got {got}, expected the labels [{len(x_start)}] themselves")


def _as_it_is(y: Tensor) -> Tensor:
    return y


def losses_from_output(
    diffusion: GaussianProcess, output: Tensor, x_start: Tensor, x_t: Tensor, t: Tensor, noise: Tensor
) -> dict[str, Tensor]:
    """:func:`training_losses` from an ``output`` that the model has already computed for ``x_t``; half
    precision is computed in float32."""
    output, x_start, x_t, noise = map(widened, (output, x_start, x_t, noise))
    if diffusion.loss_type == "rescaled_kl":
        bound, _ = vb_term(diffusion, output, x_start, x_t, t)
        return {"loss": bound * diffusion.num_timesteps}

    terms = {}
    prediction = output
    if diffusion.var_type == "learned_range":
        prediction, v = output.chunk(2, dim=1)
        frozen = torch.cat([prediction.detach(), v], dim=1)
        terms["vb"], _ = vb_term(diffusion, frozen, x_start, x_t, t)
        if diffusion.loss_type == "rescaled_mse":
            terms["vb"] = terms["vb"] * (diffusion.num_timesteps / 1000.0)
    target = x_start if diffusion.mean_type == "start_x" else noise
    terms["mse"] = min_snr_weight(diffusion, t) * mean_flat((target - prediction) ** 2)
    terms["loss"] = terms["mse"] + terms["vb"] if "vb" in terms else terms["mse"]
    return terms


def min_snr_weight(diffusion: GaussianProcess, t: Tensor) -> Tensor:
    """Weight of the squared error, float32 [B], with SNR = alphas_cumprod / (1 - alphas_cumprod).

    min(SNR, gamma) / SNR if the model predicts noise, min(SNR, gamma) for x_0; 1 without ``min_snr_gamma``.
    """
    if diffusion.min_snr_gamma is None:
        return torch.ones(t.shape, device=t.device)
    signal = diffusion.lookup("sqrt_alphas_cumprod", t, t)
    sigma = diffusion.lookup("sqrt_one_minus_alphas_cumprod", t, t)
    snr = (signal / sigma) ** 2
    capped = snr.clamp(max=diffusion.min_snr_gamma)
    return capped if diffusion.mean_type == "start_x" else capped / snr


def vb_term(
    diffusion: GaussianProcess,
    output: Tensor,
    x_start: Tensor,
    x_t: Tensor,
    t: Tensor,
    clip_denoised: bool = False,
) -> tuple[Tensor, Tensor]:
    """One term of the variational bound [B], and the predicted x_0 like ``x_start``.

    t > 0: KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)). t = 0: -log p(x_0 | x_1), with ``x_start`` taken as
    8-bit pixels in [-1, 1] (even if it is a latent, which is not).
    """
    output, x_start, x_t = map(widened, (output, x_start, x_t))
    true_mean, _, true_log_variance = diffusion.q_posterior_mean_variance(x_start, x_t, t)
    p = diffusion.p_from_output(output, x_t, t, clip_denoised=clip_denoised)
    kl = bits_per_dim(normal_kl(true_mean, true_log_variance, p["mean"], p["log_variance"]))
    nll = -bits_per_dim(discretized_gaussian_log_likelihood(x_start, p["mean"], 0.5 * p["log_variance"]))
    return torch.where(t == 0, nll, kl), p["pred_xstart"]


@torch.no_grad()
def calc_bpd_loop(
    diffusion: GaussianProcess,
    model: Model,
    x_start: Tensor,
    clip_denoised: bool = True,
    model_kwargs: dict[str, Any] | None = None,
    *,
    generator: NoiseSource = None,
) -> dict[str, Tensor]:
    """The whole bound: ``total_bpd`` and ``prior_bpd`` [B]; ``vb``, ``xstart_mse`` and ``mse`` [B,
    num_timesteps].

    Columns are in the order of evaluation, t = num_timesteps-1 down to 0, each with its own noise.
    """
    model = in_a_loop(model, diffusion.num_timesteps)
    columns: dict[str, list[Tensor]] = {"vb": [], "xstart_mse": [], "mse": []}
    for step in reversed(range(diffusion.num_timesteps)):
        t = torch.full(x_start.shape[:1], step, device=x_start.device)
        noise = draw(generator, x_start)
        x_t = diffusion.q_sample(x_start, t, noise)
        output = diffusion.call_model(model, x_t, t, model_kwargs)
        vb, pred_xstart = vb_term(diffusion, output, x_start, x_t, t, clip_denoised)
        columns["vb"].append(vb)
        columns["xstart_mse"].append(mean_flat((pred_xstart - x_start) ** 2))
        columns["mse"].append(mean_flat((diffusion.predict_eps(x_t, t, pred_xstart) - noise) ** 2))
    stacked = {name: torch.stack(values, dim=1) for name, values in columns.items()}
    prior = prior_bpd(diffusion, x_start)
    return {"total_bpd": stacked["vb"].sum(dim=1) + prior, "prior_bpd": prior, **stacked}


def prior_bpd(diffusion: GaussianProcess, x_start: Tensor) -> Tensor:
    """KL(q(x_T | x_0) || N(0, 1)) in bits per dimension [B]: the part of the bound no model can change."""
    t = torch.full(x_start.shape[:1], diffusion.num_timesteps - 1, device=x_start.device)
    mean, _, log_variance = diffusion.q_mean_variance(x_start, t)
    zero = torch.zeros((), device=x_start.device)
    return bits_per_dim(normal_kl(mean, log_variance, zero, zero))


def normal_kl(mean1: Tensor, log_variance1: Tensor, mean2: Tensor, log_variance2: Tensor) -> Tensor:
    """KL(N1 || N2) of diagonal Gaussians, elementwise, in nats."""
    ratio = log_variance1 - log_variance2
    return 0.5 * (-1.0 - ratio + ratio.exp() + (mean1 - mean2) ** 2 * (-log_variance2).exp())


def discretized_gaussian_log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Log probability (nats) of the bin of width 2/255 around ``x``, under N(mean, exp(log_scale)^2),
    elementwise.

    The outermost bins (beyond +-0.999) reach to infinity. Probabilities are cut at 1e-12.
    """
    centred = x - mean
    inverse_scale = (-log_scale).exp()
    cdf_above = approx_standard_normal_cdf(inverse_scale * (centred + 1.0 / 255.0))
    cdf_below = approx_standard_normal_cdf(inverse_scale * (centred - 1.0 / 255.0))
    inside = torch.where(x > 0.999, 1.0 - cdf_below, cdf_above - cdf_below)
    return torch.where(x < -0.999, cdf_above, inside).clamp(min=1e-12).log()


def approx_standard_normal_cdf(x: Tensor) -> Tensor:
    """The tanh approximation of the standard normal's distribution function."""
    return 0.5 * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))


def bits_per_dim(nats: Tensor) -> Tensor:
    return mean_flat(nats) / math.log(2.0)


def mean_flat(x: Tensor) -> Tensor:
    """Mean over all dimensions but the first."""
    return x.flatten(1).mean(dim=1)
