"""Classifier-free guidance (Ho and Salimans 2022) with the power-cosine scale of MDT (Gao et al. 2023)."""

import math
import numbers

import torch
from torch import Tensor

from ..errors import UserError
from .checks import readable


def power_cosine_scale(
    t: Tensor, cfg_scale: float | Tensor, diffusion_steps: int = 1000, scale_pow: float | None = 4.0
) -> Tensor:
    """Guidance scale per sample, float32 [B]: 1 at t = ``diffusion_steps``, ``cfg_scale`` at t = 0.

    ``1 + (cfg_scale - 1) * (1 - cos(pi * (1 - t / diffusion_steps) ** scale_pow)) / 2``

    ``t`` [B], any dtype: original timesteps, 0..diffusion_steps. ``cfg_scale``: a number, or one per sample
    [B] (or [2B], of which the first half counts, as the official ``forward_with_cfg`` takes it). A large
    ``scale_pow`` keeps guidance for the last, cleanest steps; 0.01 is almost full guidance throughout; None
    means ``cfg_scale`` at every t. The result is float32 for float64 ``t`` too.
    """
    if isinstance(cfg_scale, Tensor) and cfg_scale.ndim:
        if t.ndim == 1 and cfg_scale.shape == (2 * len(t),):
            cfg_scale = cfg_scale[: len(t)]
        if cfg_scale.shape != t.shape:
            raise UserError(f"cfg_scale: got {list(cfg_scale.shape)}, expected a number or {list(t.shape)}")
        cfg_scale = cfg_scale.float()
    elif not isinstance(cfg_scale, Tensor | numbers.Real):
        raise UserError(f"cfg_scale: got {type(cfg_scale).__name__}, expected a number or a tensor")
    elif not torch.compiler.is_compiling() and not math.isfinite(cfg_scale):
        raise UserError(f"cfg_scale: got {cfg_scale}, expected a finite number")
    if diffusion_steps < 1:
        raise UserError(f"diffusion_steps: got {diffusion_steps}, expected 1 or more")
    if scale_pow is None:
        return t.new_ones(t.shape, dtype=torch.float32) * cfg_scale
    if not isinstance(scale_pow, Tensor | numbers.Real):
        raise UserError(f"scale_pow: got {scale_pow!r}, expected a number or None")
    if not 0 <= scale_pow < math.inf:
        raise UserError(f"scale_pow: got {scale_pow}, expected None, or finite and at least 0")
    if readable(t) and t.numel():
        low, high = (float(bound) for bound in t.aminmax())
        if low < 0 or high > diffusion_steps:
            raise UserError(f"t: got values from {low:g} to {high:g}, expected 0 to {diffusion_steps}")
    remaining = 1 - t.float() / diffusion_steps
    return 1 + (cfg_scale - 1) * (1 - torch.cos(remaining**scale_pow * math.pi)) / 2


def channels_to_guide(in_channels: int, out_channels: int | None = None, learn_sigma: bool = False) -> int:
    """Number of channels that guidance changes: 3 of 4, as in the published models, otherwise all.

    A model whose inputs have more channels than it predicts (an image concatenated to them, say) gives
    ``out_channels``, half of which are the variance with ``learn_sigma``: that is never guided.
    """
    if out_channels is not None:
        in_channels = min(in_channels, out_channels // 2 if learn_sigma else out_channels)
    return 3 if in_channels == 4 else in_channels


def guide(cond: Tensor, uncond: Tensor, scale: Tensor | float, channels: int) -> Tensor:
    """Guided output [2n, O, ...] from the conditional and unconditional outputs, [n, O, ...] each.

    The first ``channels`` become ``uncond + scale * (cond - uncond)`` in both halves; the other channels stay
    as they are in each half. ``scale``: a number or [n]. The published models guide 3 of their 4 noise
    channels.
    """
    if cond.shape != uncond.shape:
        raise UserError(f"uncond: got {list(uncond.shape)}, expected the shape of cond, {list(cond.shape)}")
    if not 0 <= channels <= cond.shape[1]:
        raise UserError(f"channels: got {channels}, expected 0 to {cond.shape[1]}")
    if isinstance(scale, Tensor):
        if scale.shape != cond.shape[:1]:
            raise UserError(f"scale: got {list(scale.shape)}, expected a number or shape {[cond.shape[0]]}")
        scale = scale.view(-1, *[1] * (cond.ndim - 1))
    start = uncond[:, :channels]
    guided = start + scale * (cond[:, :channels] - start)
    rest = torch.cat([cond[:, channels:], uncond[:, channels:]])
    return torch.cat([torch.cat([guided, guided]), rest], dim=1)
