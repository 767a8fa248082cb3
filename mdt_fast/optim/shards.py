"""The part of a tensor on this rank, and its memory layout."""

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ..errors import UserError
from ..kernels.optim.op import is_dense


def local(tensor: Tensor) -> Tensor:
    """This rank's part: a view of a DTensor's shard; any other tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def split(index: int, p: DTensor, grad: Tensor) -> tuple[Any, tuple[int, ...]] | None:
    """The device mesh and those dimensions across which ``grad`` is sharded; None if it is replicated.

    Raises ``UserError`` unless the gradient has the placements of its parameter.
    """
    placements = grad.placements if isinstance(grad, DTensor) else "none, it is no DTensor"
    if placements != p.placements:
        raise UserError(
            f"parameter {index}: its gradient's placements are {placements}, its own {p.placements}; "
            "reduce or redistribute the gradient first"
        )
    dims = tuple(dim for dim, placement in enumerate(p.placements) if not placement.is_replicate())
    return (p.device_mesh, dims) if dims else None


def laid_out(tensor: Tensor, like: Tensor) -> Tensor:
    """``tensor`` with the strides of ``like`` (contiguous if those have gaps); itself if they match."""
    if not is_dense(like):
        return tensor.contiguous()
    if tensor.stride() == like.stride():
        return tensor
    return torch.empty_like(like, dtype=tensor.dtype, device=tensor.device).copy_(tensor)
