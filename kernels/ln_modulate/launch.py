"""Launches of the Triton kernels. B samples, R rows (tokens of all samples), D width, P partial sums."""

import torch
from torch import Tensor

from ..launcher import launch
from ..launches import chosen, columns
from ..sums.launch import sum_parts
from .config import launch_config, thin_config
from .kernel import (
    gate_residual_bwd_kernel,
    gate_residual_fwd_kernel,
    ln_modulate_bwd_kernel,
    ln_modulate_fwd_kernel,
)


def _length(R: int, B: int, offsets: Tensor | None) -> int:
    """Tokens per sample. With offsets it is not read, and 0: Triton may compile again for another number."""
    return R // B if offsets is None else 0


def ln_modulate_fwd(
    x_RD: Tensor,
    y_RD: Tensor | None,
    gate_BD: Tensor | None,
    shift_BD: Tensor,
    scale_BD: Tensor,
    offsets: Tensor | None,
    eps: float,
    residual_RD: Tensor | None,
    out_RD: Tensor,
    mean_R: Tensor,
    rstd_R: Tensor,
    out_scale_R: Tensor | None = None,
) -> None:
    (R, D), B, unused = x_RD.shape, shift_BD.shape[0], x_RD
    name = "ln_modulate_fwd" if y_RD is None else "gate_residual_ln_modulate_fwd"
    config = chosen(launch_config, name, x_RD, columns(D), D, B, R // B)
    launch(
        ln_modulate_fwd_kernel, (B, config.programs),
        x_RD, unused if y_RD is None else y_RD, unused if gate_BD is None else gate_BD,
        shift_BD, scale_BD, unused if offsets is None else offsets,
        unused if residual_RD is None else residual_RD, out_RD,
        mean_R if out_scale_R is None else out_scale_R, mean_R, rstd_R,
        _length(R, B, offsets), D,
        0 if gate_BD is None else gate_BD.stride(0), shift_BD.stride(0), scale_BD.stride(0),
        eps, GATED=y_RD is not None, OFFSETS=offsets is not None, FLOAT8=out_scale_R is not None,
        BLOCK_D=config.block_d, STAGES=config.num_stages, num_warps=config.num_warps,
    )  # fmt: skip


def ln_modulate_bwd(
    x_RD: Tensor,
    y_RD: Tensor | None,
    gate_BD: Tensor | None,
    shift_BD: Tensor,
    scale_BD: Tensor,
    offsets: Tensor | None,
    mean_R: Tensor,
    rstd_R: Tensor,
    dresidual_RD: Tensor | None,
    dout_RD: Tensor,
    dx_RD: Tensor,
    dy_RD: Tensor | None,
    dgate_BD: Tensor | None,
    dshift_BD: Tensor,
    dscale_BD: Tensor,
    out_RD: Tensor | None,
) -> None:
    (R, D), B, unused = x_RD.shape, shift_BD.shape[0], x_RD
    if y_RD is None:
        config = chosen(launch_config, "ln_modulate_bwd", x_RD, columns(D), D, B, R // B)
    else:
        name = "gate_residual_ln_modulate_bwd"
        config = chosen(thin_config, name, x_RD, columns(D), D, B, R // B)
    sums = [dshift_BD, dscale_BD, *([] if dgate_BD is None else [dgate_BD])]
    parts_KBPD = x_RD.new_empty(len(sums), B, config.programs, D, dtype=torch.float32)
    launch(
        ln_modulate_bwd_kernel, (B, config.programs),
        x_RD, unused if y_RD is None else y_RD, unused if gate_BD is None else gate_BD, shift_BD, scale_BD,
        unused if offsets is None else offsets, mean_R, rstd_R,
        unused if dresidual_RD is None else dresidual_RD, dout_RD,
        dx_RD, unused if dy_RD is None else dy_RD, parts_KBPD[-1], parts_KBPD[0], parts_KBPD[1],
        unused if out_RD is None else out_RD,
        _length(R, B, offsets), D,
        0 if gate_BD is None else gate_BD.stride(0), shift_BD.stride(0), scale_BD.stride(0),
        GATED=y_RD is not None, RESIDUAL=dresidual_RD is not None, OFFSETS=offsets is not None,
        RECOMPUTE=out_RD is not None, BLOCK_D=config.block_d, STAGES=config.num_stages,
        num_warps=config.num_warps,
    )  # fmt: skip
    sum_parts(parts_KBPD, sums)


def gate_residual_fwd(
    x_RD: Tensor, y_RD: Tensor, gate_BD: Tensor, offsets: Tensor | None, out_RD: Tensor
) -> None:
    (R, D), B = x_RD.shape, gate_BD.shape[0]
    config = chosen(thin_config, "gate_residual_fwd", x_RD, columns(D), D, B, R // B)
    launch(
        gate_residual_fwd_kernel, (B, config.programs),
        x_RD, y_RD, gate_BD, x_RD if offsets is None else offsets, out_RD, _length(R, B, offsets), D,
        gate_BD.stride(0),
        OFFSETS=offsets is not None, BLOCK_D=config.block_d, STAGES=config.num_stages,
        num_warps=config.num_warps,
    )  # fmt: skip


def gate_residual_bwd(
    y_RD: Tensor, gate_BD: Tensor, offsets: Tensor | None, dout_RD: Tensor, dy_RD: Tensor, dgate_BD: Tensor
) -> None:
    (R, D), B = y_RD.shape, gate_BD.shape[0]
    config = chosen(thin_config, "gate_residual_bwd", y_RD, columns(D), D, B, R // B)
    parts_BPD = y_RD.new_empty(B, config.programs, D, dtype=torch.float32)
    launch(
        gate_residual_bwd_kernel, (B, config.programs),
        y_RD, gate_BD, y_RD if offsets is None else offsets, dout_RD, dy_RD, parts_BPD,
        _length(R, B, offsets), D, gate_BD.stride(0),
        OFFSETS=offsets is not None, BLOCK_D=config.block_d, STAGES=config.num_stages,
        num_warps=config.num_warps,
    )  # fmt: skip
    sum_parts(parts_BPD[None], [dgate_BD])
