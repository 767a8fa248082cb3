"""Launch choices that were measured, as data: ``tuned.json``, by kernel, architecture and shape class.

``bench/tune.py --write`` fills that file. Each entry holds keyword arguments of a room's ``launch_config``;
what it does not say stays as ``config.py`` has it. Nothing is tried at import or in a user's first step.
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
"""A kernel's name, without ``_kernel``, after its op; and a shape class (:func:`shape_class`)."""

Config = TypeVar("Config")
"""What a launch needs, as a room's ``config.py`` makes it."""

_forced: dict[Entry, Choice] = {}
_memories: list[Any] = []


def remembered(function: Callable[..., Config]) -> Callable[..., Config]:
    """``function``, called once for the same arguments: a launch has no time for reading tables."""
    memory = lru_cache(4096)(function)  # lengths may go on being new
    _memories.append(memory)
    return memory


def chosen(make: Callable[..., Config], kernel: str, x: Tensor, size: int, *sizes: int) -> Config:
    """``make(*sizes)``, a room's launch choices, with what was found for ``kernel`` on the device and in the
    dtype of ``x``; ``size`` is what its room goes by (columns, features, a head)."""
    arch = architecture(x.device.index) if x.is_cuda else "cpu"
    return _chosen(make, kernel, arch, x.element_size() == 2, size, sizes)


@remembered
def _chosen(
    make: Callable[..., Any], kernel: str, arch: str, half: bool, size: int, sizes: tuple[int, ...]
) -> Any:
    return make(*sizes, **tuned_for((kernel, shape_class(size, half)), arch))


def tuned_for(entry: Entry, arch: str) -> Choice:
    """What was found for a kernel, on an architecture of ``aot.ARCHITECTURES`` that need not be here."""
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
    """``choice`` in place of what ``tuned.json`` says, for all threads: for the tuner alone."""
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
    """What a room goes by, and whether elements take two bytes, or are float32 in TF32's products:
    ``2048 half``, ``2048 float32``, ``64 tf32``."""
    return f"{size} {'half' if half else 'tf32' if tf32 else 'float32'}"


def cdiv(size: int, block: int) -> int:
    """How many blocks hold ``size``; Triton's takes 2 us on the host."""
    return -(-size // block)


def columns(size: int) -> int:
    """The power of two, 32 or more, that holds ``size``: what blocks of whole rows are as wide as."""
    return max(32, 1 << (size - 1).bit_length())


@cache
def architecture(device: int | None) -> str:
    """The newest architecture of ``aot.ARCHITECTURES`` that is not newer than the GPU; for those without a
    data center's tensor cores (12.x) the oldest, whose choices fit into the 99 KB of 8.6, 8.9 and 12.x."""
    if torch.version.hip is not None:
        return "gfx942"
    major, _ = torch.cuda.get_device_capability(device)
    return {9: "sm_90", 10: "sm_100", 11: "sm_100"}.get(major, "sm_80")
