"""The optimiser steps in plain PyTorch with ``torch._foreach_*`` operations; any device, float64 too.

Arguments and meaning are those of the native ops, with two differences. The host reads the norm, the learning
rate and the step counts, which synchronises with a GPU. And bfloat16 moments are rounded to nearest.
"""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ..checks import plain_only


def grad_sumsq(grads: list[Tensor]) -> Tensor:
    """The sum of squares of all elements: 0-dim float64, accumulated in float64."""
    if plain_only():  # torch.func.vmap has no rule for the other
        return torch.stack([grad.double().square().sum() for grad in grads]).sum()
    norms = torch._foreach_norm(grads, 2, dtype=torch.float64)
    return torch.stack(norms).square().sum()


def adan_step(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avg: list[Tensor],
    exp_avg_diff: list[Tensor],
    exp_avg_sq: list[Tensor],
    neg_pre_grad: list[Tensor],
    masters: list[Tensor],
    emas: list[Tensor],
    steps: list[Tensor],
    lr: Tensor,
    grad_norm: Tensor,
    beta1: float,
    beta2: float,
    beta3: float,
    eps: float,
    weight_decay: float,
    no_prox: bool,
    max_grad_norm: float,
    clip_eps: float,
    ema_decays: Sequence[float],
) -> None:
    """One step of Adan (Xie et al. 2022, algorithm 1) in place; nothing if ``grad_norm`` is not finite."""
    norm = float(grad_norm)
    if not math.isfinite(norm):
        return
    rate, k = float(lr), _advance(steps, len(params))
    weights = masters or params
    g = _clipped(grads, weights, norm, max_grad_norm, clip_eps)
    stored = (exp_avg, exp_avg_diff, exp_avg_sq, neg_pre_grad)
    m, v, n, d = (_as(moments, weights) for moments in stored)

    torch._foreach_add_(d, g)
    for d_i, k_i in zip(d, k):
        if k_i == 1:
            d_i.zero_()
    torch._foreach_lerp_(m, g, 1 - beta1)
    torch._foreach_lerp_(v, d, 1 - beta2)
    torch._foreach_mul_(d, beta2)
    torch._foreach_add_(d, g)
    torch._foreach_mul_(n, beta3)
    torch._foreach_addcmul_(n, d, d, value=1 - beta3)

    denom = _denominator(n, [math.sqrt(1 - beta3**k_i) for k_i in k], eps)
    if no_prox:
        torch._foreach_mul_(weights, 1 - rate * weight_decay)
    torch._foreach_addcdiv_(weights, m, denom, [-rate / (1 - beta1**k_i) for k_i in k])
    torch._foreach_addcdiv_(weights, v, denom, [-rate * beta2 / (1 - beta2**k_i) for k_i in k])
    if not no_prox:
        torch._foreach_div_(weights, 1 + rate * weight_decay)
    torch._foreach_copy_(d, g)
    torch._foreach_neg_(d)
    _finish(params, weights, emas, ema_decays, zip(stored, (m, v, n, d)))


def adamw_step(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avg: list[Tensor],
    exp_avg_sq: list[Tensor],
    masters: list[Tensor],
    emas: list[Tensor],
    steps: list[Tensor],
    lr: Tensor,
    grad_norm: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    max_grad_norm: float,
    clip_eps: float,
    ema_decays: Sequence[float],
) -> None:
    """One step of AdamW (Loshchilov and Hutter 2019) in place; nothing if ``grad_norm`` is not finite."""
    norm = float(grad_norm)
    if not math.isfinite(norm):
        return
    rate, k = float(lr), _advance(steps, len(params))
    weights = masters or params
    g = _clipped(grads, weights, norm, max_grad_norm, clip_eps)
    stored = (exp_avg, exp_avg_sq)
    m, v = (_as(moments, weights) for moments in stored)

    torch._foreach_mul_(weights, 1 - rate * weight_decay)
    torch._foreach_lerp_(m, g, 1 - beta1)
    torch._foreach_mul_(v, beta2)
    torch._foreach_addcmul_(v, g, g, value=1 - beta2)
    denom = _denominator(v, [math.sqrt(1 - beta2**k_i) for k_i in k], eps)
    torch._foreach_addcdiv_(weights, m, denom, [-rate / (1 - beta1**k_i) for k_i in k])
    _finish(params, weights, emas, ema_decays, zip(stored, (m, v)))


def _advance(steps: list[Tensor], n: int) -> list[float]:
    """Increment the step counts; returns those of the n parameters as numbers."""
    torch._foreach_add_(steps, 1)
    counts = torch.stack(steps).tolist()
    return counts if len(counts) == n else counts * n


def _clipped(
    grads: list[Tensor], weights: list[Tensor], norm: float, max_grad_norm: float, clip_eps: float
) -> list[Tensor]:
    """The clipped gradients in the dtype of the weights; ``grads`` themselves if there is nothing to do."""
    g = _as(grads, weights)
    bound, long = max_grad_norm, norm + clip_eps
    scale = bound / long if 0 < bound < long else 1.0
    return g if scale >= 1 else list(torch._foreach_mul(g, scale))


def _as(tensors: list[Tensor], weights: list[Tensor]) -> list[Tensor]:
    return [tensor.to(weight.dtype) for tensor, weight in zip(tensors, weights)]


def _denominator(squares: list[Tensor], corrections: list[float], eps: float) -> list[Tensor]:
    denom = list(torch._foreach_sqrt(squares))
    torch._foreach_div_(denom, corrections)
    torch._foreach_add_(denom, eps)
    return denom


def _finish(
    params: list[Tensor],
    weights: list[Tensor],
    emas: list[Tensor],
    ema_decays: Sequence[float],
    moments: Iterable[tuple[list[Tensor], list[Tensor]]],
) -> None:
    """Store results that were computed in another dtype, and update the averages."""
    for stored, computed in moments:
        if any(to is not value for to, value in zip(stored, computed)):
            torch._foreach_copy_(stored, computed)
    if weights is not params:
        torch._foreach_copy_(params, weights)
    for i, decay in enumerate(ema_decays):
        averages = emas[i * len(params) : (i + 1) * len(params)]
        torch._foreach_lerp_(averages, _as(weights, averages), 1 - decay)
