"""Plain PyTorch, any device and dtype.

B samples (n conditional, then n unconditional; x may hold only the n conditional ones), K coefficients.
"""

import torch
from torch import Tensor


def cfg_step(
    output: Tensor,
    x: Tensor,
    noise: Tensor | None,
    coefficients_BK: Tensor,
    scale_n: Tensor | None,
    guided_channels: int,
    kind: str,
    predicts: str,
    clip_denoised: bool,
) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(x.dtype, torch.float32)
    C, wide = x.shape[1], [-1] + [1] * (x.ndim - 1)
    value, v = output[:, :C].to(dtype), output[:, C:].to(dtype)
    if scale_n is not None:
        cond, uncond = value.chunk(2)
        guided = uncond + scale_n.to(dtype).view(wide) * (cond - uncond)
        if len(x) < len(output):
            value, v = cond, v[: len(x)]
        else:
            guided = torch.cat([guided, guided])
        value = torch.cat([guided[:, :guided_channels], value[:, guided_channels:]], dim=1)

    x_t = x.to(dtype)
    columns = [column.view(wide) for column in coefficients_BK.to(dtype).unbind(1)]
    recip, recipm1 = columns[:2]
    pred_xstart = value if predicts == "start_x" else recip * x_t - recipm1 * value
    if clip_denoised:
        pred_xstart = pred_xstart.clamp(-1, 1)
    if kind == "ddpm":
        coef1, coef2, lower, upper, move = columns[2:]
        fraction = (v + 1) / 2 if v.shape[1] else 0.0
        sigma = move * (0.5 * (fraction * upper + (1 - fraction) * lower)).exp()
        sample = coef1 * pred_xstart + coef2 * x_t
    else:
        signal_prev, direction, sigma = columns[2:]
        eps = (recip * x_t - pred_xstart) / recipm1  # from the clipped x_0
        sample = pred_xstart * signal_prev + direction * eps
    if noise is not None:
        sample = sample + sigma * noise.to(dtype)
    return sample.to(x.dtype), pred_xstart.to(x.dtype)
