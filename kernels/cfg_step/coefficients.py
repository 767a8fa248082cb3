"""A sampler's steps as a table of coefficients with one row per timestep, made once before the loop.

Source: Ho et al. 2020 (DDPM) equations 6, 7 and 15; Nichol and Dhariwal 2021 equation 15 (learned variance);
Song et al. 2021 (DDIM) equations 12 and 16.
"""

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

Variance = Literal["learned_range", "fixed_small", "fixed_large"]
SMALLEST = 1e-76


def ddpm_coefficients(
    alphas_cumprod: Tensor | Sequence[float], variance: Variance = "learned_range"
) -> Tensor:
    """Coefficients of ancestral sampling: float32 [T, 7] on the CPU, for T (possibly respaced) timesteps.

    ``alphas_cumprod`` [T] (a tensor or numbers, taken as float64) is the share of signal variance left after
    each step: strictly decreasing, below 1 and at least 1e-76. With a = ``alphas_cumprod``, the columns are
    sqrt(1/a); sqrt(1/a - 1); the factors of x_0 and of x_t in the posterior mean; the lower and the upper
    bound of the log variance (the posterior's, clipped at t = 0, and log beta); and a flag that is 0 at t = 0
    and 1 elsewhere. With a fixed variance, both bounds are its log variance. Raises ``ValueError`` for other
    ``alphas_cumprod`` and for an unknown ``variance``.
    """
    if variance not in get_args(Variance):
        raise ValueError(f"variance: got {variance!r}, expected {', '.join(get_args(Variance))}")
    a = _alphas_cumprod(alphas_cumprod)
    prev = torch.cat([a.new_ones(1), a[:-1]])
    alphas = a / prev
    betas = 1 - alphas
    posterior = betas * (1 - prev) / (1 - a)
    # The posterior variance is 0 at t = 0; use the variance of t = 1 there, before the logarithm.
    first = posterior[1:2] if len(a) > 1 else betas
    lower = torch.cat([first, posterior[1:]]).log()
    upper = betas.log()
    if variance == "fixed_small":
        upper = lower
    elif variance == "fixed_large":
        lower = upper = torch.cat([first, betas[1:]]).log()
    coef1, coef2 = betas * prev.sqrt() / (1 - a), (1 - prev) * alphas.sqrt() / (1 - a)
    return torch.stack([*_recip(a), coef1, coef2, lower, upper, _move(a)], dim=1).float()


def ddim_coefficients(alphas_cumprod: Tensor | Sequence[float], eta: float = 0.0) -> Tensor:
    """Coefficients of DDIM: float32 [T, 5] on the CPU; for ``alphas_cumprod``, see :func:`ddpm_coefficients`.

    ``eta`` 0 is deterministic, and 1 has DDPM's variance. The columns are sqrt(1/a), sqrt(1/a - 1),
    sqrt(a_prev), the factor of the predicted noise, and the factor of fresh noise (0 at t = 0). Raises
    ``ValueError`` for ``alphas_cumprod`` or ``eta`` out of range.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta: got {eta}, expected 0 to 1")
    exact = _alphas_cumprod(alphas_cumprod)
    # As in the published samplers: round to float32 first, then compute in float32.
    a = exact.float()
    prev = torch.cat([a.new_ones(1), a[:-1]])
    # Where float32 rounds to 1 or to (nearly) 0, the limits and the exact quotients replace 0 / 0.
    tiny = torch.finfo(torch.float32).tiny
    noise = torch.where(a < 1, (1 - prev) / (1 - a), 0)
    alphas = torch.where(prev >= tiny, a / prev, exact / torch.cat([exact.new_ones(1), exact[:-1]])).float()
    sigma = eta * noise.sqrt() * (1 - alphas).sqrt()
    direction = (1 - prev - sigma**2).clamp(min=0).sqrt()
    return torch.stack(
        [*(column.float() for column in _recip(exact)), prev.sqrt(), direction, sigma * _move(a)], dim=1
    )


def _alphas_cumprod(values: Tensor | Sequence[float]) -> Tensor:
    a = torch.as_tensor(values, dtype=torch.float64, device="cpu")
    steps = torch.cat([a.new_ones(1), a.flatten()])
    if a.ndim != 1 or not len(a) or not (steps.diff() < 0).all() or not a[-1] > 0:
        raise ValueError(
            f"alphas_cumprod: got shape {list(a.shape)}; expected [T] numbers that fall, below 1, above 0"
        )
    if a[-1] < SMALLEST:
        raise ValueError(
            f"alphas_cumprod: got {float(a[-1])}, expected {SMALLEST} or more, as sqrt(1/a) is float32"
        )
    return a


def _recip(a: Tensor) -> tuple[Tensor, Tensor]:
    return (1 / a).sqrt(), (1 / a - 1).sqrt()


def _move(a: Tensor) -> Tensor:
    move = torch.ones_like(a)
    move[0] = 0
    return move
