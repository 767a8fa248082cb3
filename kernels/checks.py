"""Argument checks shared by several rooms. Each raises a one-line ``ValueError``."""

import operator
import sys
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch
from torch.autograd import forward_ad

from .last import of_the_last
from .registry import PLAIN

FLOATING = torch.float32, torch.bfloat16, torch.float16, torch.float64
"""The dtypes to compute in. float8 is only a storage format."""
LARGEST = sys.float_info.max


def tensor(name: str, x: Any) -> None:
    """``x`` must be a tensor."""
    if not isinstance(x, Tensor):
        raise ValueError(f"{name}: got {type(x).__name__}, expected a tensor")


def shape(name: str, x: Tensor, *sizes: int | str) -> None:
    """``x`` must have these sizes. A string stands for any size and is shown in the error."""
    if not isinstance(x, Tensor):
        tensor(name, x)
    if not _fits(x.shape, sizes):
        raise ValueError(f"{name}: shape {list(x.shape)}, expected [{', '.join(map(str, sizes))}]")


def columns(name: str, x: Tensor, width: int, rows: str) -> None:
    """``x`` must have two dimensions, the second of size ``width``; ``rows`` names the first in the error."""
    if not isinstance(x, Tensor):
        tensor(name, x)
    if x.ndim != 2 or x.shape[1] != width:
        raise ValueError(f"{name}: shape {list(x.shape)}, expected [{rows}, {width}]")


def _fits(shape: torch.Size, sizes: tuple[int | str, ...]) -> bool:
    if not torch.compiler.is_compiling() and shape == sizes:  # the usual case, in one C call
        return True
    if len(shape) != len(sizes):
        return False
    for n, s in zip(shape, sizes, strict=True):  # noqa: SIM110 - a generator takes longer
        if isinstance(s, int) and n != s:
            return False
    return True


def width(name: str, x: Tensor) -> int:
    """The width D of ``x`` [..., D]."""
    if not x.ndim:
        raise ValueError(f"{name}: shape [], expected [..., D]")
    return x.shape[-1]


def floating(name: str, x: Tensor) -> None:
    """``x`` must hold floating-point numbers."""
    if not isinstance(x, Tensor):
        tensor(name, x)
    if x.dtype not in FLOATING:
        raise ValueError(f"{name}: dtype {x.dtype}, expected float16, bfloat16, float32 or float64")


def floating_on(name: str, x: Tensor, other: Tensor) -> None:
    """``x`` must hold floating-point numbers on the device of ``other``."""
    if not isinstance(x, Tensor):
        tensor(name, x)
    if x.dtype not in FLOATING or x.device != other.device:
        raise ValueError(f"{name}: {x.dtype} on {x.device}, expected floating-point on {other.device}")


def is_integer(value: Any) -> bool:
    """Whether ``value`` is an integer, Python's, NumPy's or symbolic, and no bool."""
    return isinstance(value, Integral | torch.SymInt) and not isinstance(value, bool)


def number(name: str, value: Any, expected: str, least: float = -LARGEST) -> float:
    """``value`` as a float; it must be finite and ``least`` or more; Python's, NumPy's or symbolic."""
    if not isinstance(value, int | float) and isinstance(value, Real):
        value = float(value)
    if not isinstance(value, int | float) or not least <= value <= LARGEST:
        raise ValueError(f"{name}: got {value!r}, expected {expected}")
    return float(value)


def eps(value: Any) -> float:
    """``value``, which is added to a variance, as a float; it must be finite and not negative."""
    if isinstance(value, float) and 0 <= value <= LARGEST:  # the usual case
        return value
    return number("eps", value, "finite numbers of 0 or more", 0.0)


def alike(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    """``x`` must have the dtype and the device of ``other``."""
    if x.dtype != other.dtype or x.device != other.device:
        raise ValueError(
            f"{name}: {x.dtype} on {x.device}, but {other_name} is {other.dtype} on {other.device}"
        )


def readable(x: Tensor) -> bool:
    """Whether the host may read the values of ``x``: on a CPU, but not in a compiled program, under vmap
    or of a subclass such as a fake tensor. Reading a CUDA tensor would synchronise with the device."""
    if not x.is_cpu or torch.compiler.is_compiling():
        return False
    while _functorch.is_functorch_wrapped_tensor(x):
        if _functorch.is_batchedtensor(x):
            return False
        x = _functorch.get_unwrapped(x)
    return type(x) in PLAIN


def token_ids(name: str, ids: Tensor, high: int, like: Tensor) -> None:
    """``ids`` must be int64 on the device of ``like``, and on the CPU also within 0..high-1."""
    if ids.dtype != torch.int64:
        raise ValueError(f"{name}: dtype {ids.dtype}, expected torch.int64")
    if ids.device != like.device:
        raise ValueError(f"{name}: on {ids.device}, but the tokens are on {like.device}")
    if readable(ids) and ids.numel():
        _within(name, ids, high)


@of_the_last
def _within(name: str, ids: Tensor, high: int) -> None:
    low, top = int(ids.min()), int(ids.max())
    if low < 0 or top >= high:
        raise ValueError(f"{name}: values {low}..{top}, expected 0..{high - 1}")


def offsets(name: str, offsets: Tensor, rows: Tensor) -> None:
    """``offsets`` (cu_seqlens) must be int32 [B + 1] on the device of ``rows`` [R, D].

    On the CPU they must also ascend from 0 to R.
    """
    shape(name, offsets, "B + 1")
    if offsets.dtype != torch.int32 or offsets.device != rows.device or not len(offsets):
        raise ValueError(
            f"{name}: {offsets.dtype} [{len(offsets)}] on {offsets.device}, "
            f"expected torch.int32 [B + 1] on {rows.device}"
        )
    if readable(offsets):
        _ascending(name, offsets, rows.shape[0])


@of_the_last
def _ascending(name: str, offsets: Tensor, rows: int) -> None:
    if offsets[0] != 0 or offsets[-1] != rows:
        first, last = int(offsets[0]), int(offsets[-1])
        raise ValueError(f"{name}: runs from {first} to {last}, expected 0 to {rows} (rows)")
    if (offsets.diff() < 0).any():
        raise ValueError(f"{name}: is not ascending")


def whole(value: Any) -> Any:
    """An integer of NumPy or in a tensor as a Python int, as kernels need it; other values unchanged."""
    if isinstance(value, int | float | str | torch.SymInt) or value is None or torch.compiler.is_compiling():
        return value
    return operator.index(value) if hasattr(value, "__index__") else value


def layer(x: Tensor, weight: Tensor, bias: Tensor | None) -> torch.dtype:
    """Check ``weight`` [O, D] and ``bias`` [O] of a linear layer on ``x``; returns the dtype of its products.

    That is autocast's dtype if autocast is on (float64 stays), else the dtype of ``x``, which both must have.
    """
    autocast = autocasts(x)
    if weight.dtype != x.dtype or weight.device != x.device:
        parameter("weight", weight, x, autocast)
    if bias is not None:
        if not isinstance(bias, Tensor) or bias.dtype != x.dtype or bias.device != x.device:
            parameter("bias", bias, x, autocast)
        shape("bias", bias, weight.shape[0])
    if autocast and x.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return weight.dtype


def autocasts(x: Tensor) -> bool:
    """Whether autocast is on for the device of ``x``."""
    # The meta device has no autocast and must not be asked about it.
    return not x.is_meta and torch.is_autocast_enabled(x.device.type)


def parameter(name: str, p: Tensor, x: Tensor, autocast: bool) -> None:
    """``p`` must have the dtype of ``x``; under autocast, any floating one (but it does not cast float64)."""
    floating_on(name, p, x)
    if p.dtype != x.dtype and (not autocast or torch.float64 in (p.dtype, x.dtype)):
        alike(name, p, "x", x)


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x.to(dtype)``, but ten times faster on the host when there is nothing to do."""
    return x if x.dtype == dtype else x.to(dtype)


def plain_only() -> bool:
    """Whether only plain PyTorch may be used.

    That is so under transforms of torch.func and forward-mode differentiation, which only see into plain
    PyTorch, and under torch.export and torch.jit.trace, whose programs must run without this package.
    """
    if torch._C._functorch.maybe_current_level() is not None or forward_ad._current_level >= 0:
        return True
    # exporting() inlined: a block makes some twenty calls
    return bool(torch.compiler._is_exporting_flag) or torch._C._get_tracing_state() is not None


def exporting() -> bool:
    """Whether ``torch.export`` or ``torch.jit.trace`` is running.

    This reads the former's flag, because torch 2.11 compiles ``torch.compiler.is_exporting`` as true even
    under ``torch.compile``.
    """
    return bool(torch.compiler._is_exporting_flag) or torch._C._get_tracing_state() is not None
