"""Argument checks and dispatch.

B samples (n conditional, then n unconditional), C channels, K coefficients.
"""

from collections.abc import Callable
from numbers import Real
from typing import Literal, get_args

import torch
from torch import Tensor

from .. import checks
from ..backends import uses_triton
from . import reference

Kind = Literal["ddpm", "ddim"]
Predicts = Literal["epsilon", "start_x"]
COLUMNS = {"ddpm": 7, "ddim": 5}


def cfg_step(
    output: Tensor,
    x: Tensor,
    noise: Tensor | None,
    coefficients: Tensor,
    *,
    scale: Tensor | float | None = None,
    guided_channels: int = 3,
    kind: Kind = "ddpm",
    predicts: Predicts = "epsilon",
    clip_denoised: bool = False,
) -> tuple[Tensor, Tensor]:
    """One step of guided sampling; returns x_{t-1} and the predicted x_0, both like ``x``.

    ``output`` is the model's output. It is [B, 2C, ...] with a learned variance, whose channels hold the
    interpolation between the variance's bounds, or [B, C, ...] with a fixed variance. ``x`` and ``noise`` are
    [B, C, ...]; with ``noise`` None no noise is added. All are floating. ``coefficients`` (float32) is one
    row of ``ddpm_coefficients`` or ``ddim_coefficients`` for the whole batch, or one row per sample of ``x``.
    It is on the device of ``x``, so that one captured CUDA graph can be replayed for every step.

    ``scale`` is the guidance weight: a number, or a floating tensor [n]. B is then 2n: n conditional samples,
    followed by the same n unconditional ones. In both halves the first ``guided_channels`` channels (3 of 4
    in the published models) become uncond + scale * (cond - uncond). Each half keeps its other channels and
    its variance. If ``x`` and ``noise`` are [n, C, ...], only the conditional samples are stepped, from the
    outputs of both halves. With ``scale`` None there is no guidance. ``clip_denoised`` clamps the predicted
    x_0 to [-1, 1].

    For inference only: raises ``ValueError`` if an input requires a gradient while gradients are enabled, and
    for shapes, dtypes, devices or names that do not fit. Source: Ho et al. 2020, algorithm 2; Song et al.
    2021; Ho and Salimans 2022 (guidance).
    """
    names = (("kind", kind, get_args(Kind)), ("predicts", predicts, get_args(Predicts)))
    for name, value, allowed in names:
        if value not in allowed:
            raise ValueError(f"{name}: got {value!r}, expected {', '.join(allowed)}")
    guided_channels = checks.whole(guided_channels)
    scale_n = _check(output, x, noise, coefficients, scale, guided_channels)
    coefficients_BK = _rows(coefficients, x, kind)
    serve: Callable[..., tuple[Tensor, Tensor]] = reference.cfg_step
    if uses_triton(x) and uses_triton(output):
        from .triton_op import cfg_step_fwd  # not at the top: not every machine has Triton

        serve = cfg_step_fwd
        output, x = output.contiguous(), x.contiguous()
        noise = None if noise is None else noise.contiguous()
    return serve(output, x, noise, coefficients_BK, scale_n, guided_channels, kind, predicts, clip_denoised)


def _check(
    output: Tensor,
    x: Tensor,
    noise: Tensor | None,
    coefficients: Tensor,
    scale: Tensor | float | None,
    guided_channels: int,
) -> Tensor | None:
    """The guidance weights as float32 [n]."""
    for name, given in (("output", output), ("coefficients", coefficients)):
        checks.tensor(name, given)
    checks.floating("x", x)
    if x.ndim < 2:
        raise ValueError(f"x: shape {list(x.shape)}, expected [B, C, ...]")
    C, *rest = x.shape[1:]
    half = scale is not None and output.ndim > 0 and output.shape[0] == 2 * x.shape[0]
    B = 2 * x.shape[0] if half else x.shape[0]
    channels = output.shape[1] if output.ndim > 1 and output.shape[1] == C else 2 * C
    checks.shape("output", output, B, channels, *rest)
    checks.floating_on("output", output, x)
    if noise is not None:
        checks.shape("noise", noise, *x.shape)
        checks.floating_on("noise", noise, x)
    if torch.is_grad_enabled():
        tensors = {"output": output, "x": x, "noise": noise, "coefficients": coefficients, "scale": scale}
        for name, tensor in tensors.items():
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                raise ValueError(f"{name}: needs a gradient, a sampling step has none; use torch.no_grad()")
    if scale is None:
        return None
    if B % 2:
        raise ValueError(f"x: {B} samples, guidance needs an even number (conditional, then unconditional)")
    if not isinstance(guided_channels, int | torch.SymInt) or not 0 <= guided_channels <= C:
        raise ValueError(f"guided_channels: got {guided_channels}, expected 0 to {C}")
    if not isinstance(scale, Tensor):
        huge = isinstance(scale, int) and not -checks.LARGEST <= scale <= checks.LARGEST
        if huge or not isinstance(scale, int | float | Real):
            raise ValueError(f"scale: got {type(scale).__name__}, expected a number or a tensor [{B // 2}]")
        return torch.full((1,), float(scale), dtype=torch.float32, device=x.device).expand(B // 2)
    checks.shape("scale", scale, B // 2)
    checks.floating_on("scale", scale, x)
    return scale.float()


def _rows(coefficients: Tensor, x: Tensor, kind: Kind) -> Tensor:
    K = COLUMNS[kind]
    shape = (K,) if coefficients.ndim == 1 else (x.shape[0], K)
    checks.shape("coefficients", coefficients, *shape)
    if coefficients.dtype != torch.float32 or coefficients.device != x.device:
        raise ValueError(
            f"coefficients: {coefficients.dtype} on {coefficients.device}, "
            f"expected torch.float32 on {x.device}"
        )
    return coefficients.contiguous().expand(x.shape[0], K)
