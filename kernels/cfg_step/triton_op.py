"""The Triton kernel as a registered op. B samples, K coefficients, n = B/2 pairs with guidance."""

import math

import torch
from torch import Tensor

from ..launcher import launch
from ..launches import cdiv, chosen, columns
from ..registry import registered
from .config import launch_config
from .kernel import cfg_step_kernel

KINDS = ("ddpm", "ddim")


@registered("mdt_fast::cfg_step")
def cfg_step_fwd(
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
    """x_{t-1} and the predicted x_0, both like ``x``. Expanded coefficients and scales are read without a
    copy."""
    sample, xstart, B = torch.empty_like(x), torch.empty_like(x), output.shape[0]
    if not x.numel():
        return sample, xstart
    numbers = x[0].numel()
    config = chosen(launch_config, "cfg_step", output, columns(numbers), numbers)
    pairs = B if scale_n is None else B // 2
    # Only the first grid axis may exceed 65535.
    launch(
        cfg_step_kernel, (pairs, cdiv(numbers, config.block)),
        output, x, x if noise is None else noise, coefficients_BK, x if scale_n is None else scale_n,
        sample, xstart, pairs, numbers, output[0].numel(), guided_channels * math.prod(x.shape[2:]),
        coefficients_BK.stride(0), 0 if scale_n is None else scale_n.stride(0),
        GUIDED=scale_n is not None, BOTH=x.shape[0] == B, KIND=KINDS.index(kind),
        START_X=predicts == "start_x", LEARNED=output.shape[1] > x.shape[1], NOISE=noise is not None,
        CLIP=clip_denoised,
        BLOCK=config.block, num_warps=config.num_warps,
    )  # fmt: skip
    return sample, xstart


@cfg_step_fwd.register_fake
def _(output, x, *_):  # type: ignore[no-untyped-def]
    return torch.empty_like(x), torch.empty_like(x)
