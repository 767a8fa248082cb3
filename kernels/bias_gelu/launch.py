"""Launches of the Triton kernels. R rows, F features, P partial sums."""

import torch
from torch import Tensor

from ..launcher import launch
from ..launches import cdiv, chosen, columns
from ..sums.launch import sum_parts
from .config import launch_config
from .kernel import bias_gelu_bwd_kernel, bias_gelu_fwd_kernel


def bias_gelu_fwd(x_RF: Tensor, bias_1F: Tensor, out_RF: Tensor) -> None:
    R, F = x_RF.shape
    config = chosen(launch_config, "bias_gelu_fwd", x_RF, columns(F), R, F)
    launch(
        bias_gelu_fwd_kernel, (cdiv(F, config.block_f) * cdiv(R, config.block_r),),
        x_RF, bias_1F, out_RF, R, F,
        BLOCK_R=config.block_r, BLOCK_F=config.block_f, num_warps=config.num_warps,
    )  # fmt: skip


def bias_gelu_bwd(
    x_RF: Tensor, bias_1F: Tensor, dout_RF: Tensor, dx_RF: Tensor, dbias_1F: Tensor, out_RF: Tensor | None
) -> None:
    R, F = x_RF.shape
    config = chosen(launch_config, "bias_gelu_bwd", x_RF, columns(F), R, F)
    parts_PF = x_RF.new_empty(config.parts, F, dtype=torch.float32)
    launch(
        bias_gelu_bwd_kernel, (cdiv(F, config.block_f), config.parts),
        x_RF, bias_1F, dout_RF, dx_RF, parts_PF, x_RF if out_RF is None else out_RF, R, F,
        RECOMPUTE=out_RF is not None, BLOCK_R=config.block_r, BLOCK_F=config.block_f,
        STAGES=config.num_stages, num_warps=config.num_warps,
    )  # fmt: skip
    sum_parts(parts_PF[None, None], [dbias_1F])
