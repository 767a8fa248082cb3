"""Measured launch choices as data: ``tuned.json``, by kernel, architecture and shape class.

``bench/tune.py --write`` fills that file. Each entry holds keyword arguments of a ``launch_config``;
arguments it does not name keep their defaults from ``config.py``. Nothing is tuned at import or in a user's
first step.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

TUNED = Path(__file__).with_name("tuned.json")

Choice = Mapping[str, int]
"""Keyword arguments of a ``launch_config``."""
Entry = tuple[str, str]
"""A kernel's name, which follows its op's, without ``_kernel``; and a shape class (:func:`shape_class`)."""

Config = TypeVar("Config")
"""The launch choices that a ``config.py`` returns."""

_forced: dict[Entry, Choice] = {}
_memories: list[Any] = []


def remembered(function: Callable[..., Config]) -> Callable[..., Config]:
    """``function``, called once for the same arguments: a launch has no time to look up tables."""
    memory = lru_cache(4096)(function)  # bounded, because new lengths may keep coming
    _memories.append(memory)
    return memory


def chosen(make: Callable[..., Config], kernel: str, x: Tensor, size: int, *sizes: int) -> Config:
    """The launch choices ``make(*sizes)``, with those measured for ``kernel`` on the device and in the dtype
    of ``x``. ``size`` selects the shape class (columns, features or head size, depending on the kernel)."""
    arch = architecture(x.device.index) if x.is_cuda else "cpu"
    return _chosen(make, kernel, arch, x.element_size() == 2, size, sizes)


@remembered
def _chosen(
    make: Callable[..., Any], kernel: str, arch: str, half: bool, size: int, sizes: tuple[int, ...]
) -> Any:
    return make(*sizes, **tuned_for((kernel, shape_class(size, half)), arch))


def tuned_for(entry: Entry, arch: str) -> Choice:
    """The measured choices for a kernel on an architecture of ``aot.ARCHITECTURES``; needs no such GPU."""
    if entry in _forced:
        return _forced[entry]
    kernel, shape = entry
    return table().get(kernel, {}).get(arch, {}).get(shape, {})


@cache
def table() -> dict[str, dict[str, dict[str, dict[str, int]]]]:
    """``tuned.json``, read once."""
    found: dict[str, dict[str, dict[str, dict[str, int]]]] = json.loads(TUNED.read_text())
    return found


@contextmanager
def forced(entry: Entry, choice: Choice) -> Iterator[None]:
    """Use ``choice`` instead of ``tuned.json``'s entry, in all threads; only for the tuner."""
    before = _forced.get(entry)
    _forced[entry] = choice
    _forget()
    try:
        yield
    finally:
        del _forced[entry]
        if before is not None:
            _forced[entry] = before
        _forget()


def _forget() -> None:
    for memory in _memories:
        memory.cache_clear()


def shape_class(size: int, half: bool, tf32: bool = False) -> str:
    """The name of a shape class: a size, and whether elements have two bytes, are float32, or are float32 in
    TF32 products. Examples: ``2048 half``, ``2048 float32``, ``64 tf32``."""
    return f"{size} {'half' if half else 'tf32' if tf32 else 'float32'}"


def cdiv(size: int, block: int) -> int:
    """The number of blocks that cover ``size``. Triton's own function takes 2 us on the host."""
    return -(-size // block)


def columns(size: int) -> int:
    """The smallest power of two of at least 32 that holds ``size``: the width of blocks of whole rows."""
    return max(32, 1 << (size - 1).bit_length())


@cache
def capability(device: int | None) -> tuple[int, int]:
    """The GPU's compute capability; asking torch for it takes microseconds on the host."""
    return torch.cuda.get_device_capability(device)


@cache
def architecture(device: int | None) -> str:
    """The newest architecture of ``aot.ARCHITECTURES`` that is not newer than the GPU.

    GPUs without data-centre tensor cores (12.x) get the oldest one. Its choices fit into the 99 KB of shared
    memory of 8.6, 8.9 and 12.x.
    """
    if torch.version.hip is not None:
        return "gfx942"
    major, _ = capability(device)
    return {9: "sm_90", 10: "sm_100", 11: "sm_100"}.get(major, "sm_80")
