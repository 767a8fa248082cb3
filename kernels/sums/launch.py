"""Launches of the Triton kernel. R rows, D columns, B sums of P parts each."""

import torch
from torch import Tensor

from ..launcher import launch
from ..launches import cdiv, chosen
from .config import ANY, CHUNKS, LaunchConfig, launch_config
from .kernel import sum_chunks_kernel


def sum_rows(x_RD: Tensor, out_D: Tensor) -> None:
    """The sum of all rows."""
    R, D = x_RD.shape
    config = chosen(launch_config, "sum_chunks", x_RD, ANY, R, D)
    if config.chunks == 1:
        return _sum(x_RD, [out_D], R, R, config)
    rows = cdiv(cdiv(R, config.chunks), config.block_p) * config.block_p  # rounded up to whole blocks
    parts_CD = x_RD.new_empty(-(-R // rows), D, dtype=torch.float32)
    _sum(x_RD, [parts_CD], R, rows, config)
    chunks = launch_config(len(parts_CD), D, **CHUNKS)
    return _sum(parts_CD, [out_D], len(parts_CD), len(parts_CD), chunks)


def total(parts: Tensor, like: Tensor) -> Tensor:
    """The sum over the first dimension, in the shape and dtype of ``like``."""
    out = like.new_empty(like.shape)
    sum_rows(parts.view(len(parts), -1), out.view(-1))
    return out


def sum_parts(parts_KBPD: Tensor, outs: list[Tensor]) -> None:
    """Add up float32 partial sums [K, B, P, D] into ``outs``, K (1 to 3) contiguous tensors [B, D]."""
    _, B, P, D = parts_KBPD.shape
    _sum(parts_KBPD, outs, B * P, P, chosen(launch_config, "sum_chunks", parts_KBPD, ANY, P, D))


def _sum(x: Tensor, outs: list[Tensor], R: int, P: int, config: LaunchConfig) -> None:
    D = x.shape[-1]
    first, second, third = (*outs, outs[-1], outs[-1])[:3]
    launch(
        sum_chunks_kernel, (cdiv(R, P) * cdiv(D, config.block_d), len(outs)),
        x, first, second, third, R, P, D,
        BLOCK_P=config.block_p, BLOCK_D=config.block_d, STAGES=config.num_stages, num_warps=config.num_warps,
    )  # fmt: skip
