"""Launches of the Triton kernels. R rows, D columns, O outputs."""

import torch
from torch import Tensor

from ..launcher import launch
from ..launches import cdiv, chosen, columns
from ..sums.launch import sum_parts
from .config import MOST_PARTS, rows_config, weight_config
from .kernel import quantize_rows_kernel, quantize_weight_kernel, weight_scales_kernel


def quantize_rows(
    x_RD: Tensor,
    bias_D: Tensor | None,
    factor_D: Tensor | None,
    out_RD: Tensor,
    scale_R: Tensor,
    sums_D: Tensor | None,
) -> None:
    R, D = x_RD.shape
    config = chosen(rows_config, "quantize_rows", x_RD, columns(D), R, D)
    programs = config.programs if sums_D is None else min(config.programs, MOST_PARTS)
    parts_PD = scale_R if sums_D is None else x_RD.new_empty(programs, D, dtype=torch.float32)
    launch(
        quantize_rows_kernel, (programs,),
        x_RD, x_RD if bias_D is None else bias_D, scale_R if factor_D is None else factor_D, out_RD, scale_R,
        parts_PD, R, D,
        GELU=bias_D is not None, FACTOR=factor_D is not None, SUMS=sums_D is not None,
        BLOCK_D=config.block_d, STAGES=config.num_stages, num_warps=config.num_warps,
    )  # fmt: skip
    if sums_D is not None:
        sum_parts(parts_PD[None, None], [sums_D[None]])


def quantize_weight(
    weight_OD: Tensor, rows_OD: Tensor, columns_DO: Tensor | None, scale_O: Tensor, ones_D: Tensor
) -> None:
    outputs, D = weight_OD.shape
    config = chosen(weight_config, "quantize_weight", weight_OD, columns(D), D)
    launch(
        weight_scales_kernel, (outputs,),
        weight_OD, scale_O, D, BLOCK_D=config.row_block, num_warps=config.row_warps,
    )  # fmt: skip
    launch(
        quantize_weight_kernel, (cdiv(outputs, config.block_o) * cdiv(D, config.block_d),),
        weight_OD, scale_O, rows_OD, rows_OD if columns_DO is None else columns_DO, ones_D, outputs, D,
        COLUMNS=columns_DO is not None, BLOCK_O=config.block_o, BLOCK_D=config.block_d,
        num_warps=config.num_warps,
    )  # fmt: skip
