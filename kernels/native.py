"""The ops of ``csrc/``: two libraries, for the CPU and for CUDA, built with the package if possible.

They are loaded from this file's folder, or from the folder that ``MDT_FAST_NATIVE`` names. With
``MDT_FAST_NATIVE=0`` they are not loaded. If one is missing, PyTorch serves.
"""

import os
from pathlib import Path
from typing import Any

import torch

DEVICES = ("cpu", "cuda")
SETTING = os.environ.get("MDT_FAST_NATIVE", "")


def _load(device: str) -> str | None:
    """Load a device's library; returns the reason if it cannot serve, else None."""
    if SETTING == "0":
        return "turned off by MDT_FAST_NATIVE=0"
    folder = Path(SETTING) if SETTING else Path(__file__).parent
    if not folder.is_dir():
        return f"not there: MDT_FAST_NATIVE={SETTING} is not a folder (expected 0 or a folder)"
    found = sorted(folder.glob(f"_{device}.*"))
    if device == "cuda" and torch.version.cuda is None:
        return "this torch is built for the CPU"
    if not found and SETTING:
        return f"not in the folder that MDT_FAST_NATIVE={SETTING} names"
    if not found:
        return "not built (with torch and a C++ compiler there: pip install --no-build-isolation)"
    if device == "cuda" and MISSING["cpu"] is not None:
        return f"needs the CPU's library, which is {MISSING['cpu']}"
    try:
        torch.ops.load_library(found[0])
    except OSError as error:
        return f"cannot be loaded: {error}"
    return None


MISSING: dict[str, str | None] = {}
"""For each device, the reason why its library is not loaded, or None if it is."""
for _device in DEVICES:
    MISSING[_device] = _load(_device)


def library(device: str) -> bool:
    """Whether the native ops serve tensors on this type of device (``"cpu"``, ``"cuda"``)."""
    return MISSING.get(device, "no such device") is None


def vector_bits() -> int:
    """The vector width in bits of the CPU ops on this processor: 128, 256 or 512, or 0 if the compiler chose
    one for all processors. Raises ``RuntimeError`` without the library."""
    if not library("cpu"):
        raise RuntimeError(f"the CPU ops are {MISSING['cpu']}")
    return _VECTOR_BITS


_VECTOR_BITS: int = torch.ops.mdt_fast.vector_bits() if library("cpu") else 0
"""Asked once at import, because the graphs of torch.compile cannot hold an op that returns a number."""


class _Ops:
    """A library's ops, named as Triton's launches: ``CPU.bias_gelu_fwd`` is ``bias_gelu_fwd_cpu``."""

    def __init__(self, device: str) -> None:
        self._device = device

    def __getattr__(self, name: str) -> Any:
        op = getattr(torch.ops.mdt_fast, f"{name}_{self._device}").default
        setattr(self, name, op)  # later look-ups find it directly
        return op


CPU = _Ops("cpu")
