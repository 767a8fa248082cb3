"""Sources of Gaussian noise."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..errors import UserError

NoiseSource = torch.Generator | Callable[[Tensor], Tensor] | None
"""None: torch's default generator of the device. A generator: its own stream (a CPU generator works for any
device, and gives the same numbers on each). A function: called with a tensor, returns noise like it."""


def draw(source: NoiseSource, like: Tensor) -> Tensor:
    """Standard normal noise with the shape, dtype and device of ``like`` (a float tensor)."""
    if not like.is_floating_point():
        raise UserError(f"x: got {like.dtype}, expected a float tensor")
    if source is None:
        # Contiguous whatever the layout of ``like``: the same seed gives the same image.
        return torch.randn_like(like, memory_format=torch.contiguous_format)
    if isinstance(source, torch.Generator):
        noise = torch.randn(like.shape, generator=source, dtype=like.dtype, device=source.device)
        return noise.to(like.device)
    noise = source(like)
    check_same_shape("generator", noise, "x", like)
    return noise


def draw_shape(source: NoiseSource, shape: Sequence[int], device: torch.device) -> Tensor:
    """Standard normal noise of ``shape`` on ``device``, in the default dtype."""
    return draw(source, torch.empty(*shape, device=device))


def check_same_shape(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Raise ``UserError`` unless both are tensors of one shape (broadcasting would hide a mistake)."""
    if not isinstance(tensor, Tensor):
        raise UserError(f"{name}: got a {type(tensor).__name__}, expected a tensor like {other_name}")
    if tensor.shape != other.shape:
        raise UserError(
            f"{name}: got {list(tensor.shape)}, expected the shape of {other_name}, {list(other.shape)}"
        )
