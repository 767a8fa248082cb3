"""The ops of ``csrc/``: two libraries, for the CPU and for CUDA, built with the package where possible.

They are looked for beside this file, or in ``MDT_FAST_NATIVE`` if that names a folder; with
``MDT_FAST_NATIVE=0`` they are left alone. Where one is missing, PyTorch serves.
"""

import os
from pathlib import Path
from typing import Any

import torch

DEVICES = ("cpu", "cuda")
SETTING = os.environ.get("MDT_FAST_NATIVE", "")


def _load(device: str) -> str | None:
    """Load a device's library. Returns what keeps it from serving, or None."""
    if SETTING == "0":
        return "turned off by MDT_FAST_NATIVE=0"
    folder = Path(SETTING) if SETTING else Path(__file__).parent
    if not folder.is_dir():
        return f"not there: MDT_FAST_NATIVE={SETTING} is no folder (allowed are 0 and one)"
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
"""For each device, why its library is not loaded; None where it is."""
for _device in DEVICES:
    MISSING[_device] = _load(_device)


def library(device: str) -> bool:
    """Whether the native ops serve tensors on this type of device (``"cpu"``, ``"cuda"``)."""
    return MISSING.get(device, "no such device") is None


def vector_bits() -> int:
    """Width of the vectors that the CPU's ops compute in on this processor: 128, 256 or 512; 0 where the
    compiler chose for all processors. ``RuntimeError`` without the library."""
    if not library("cpu"):
        raise RuntimeError(f"the CPU ops are {MISSING['cpu']}")
    return _VECTOR_BITS


_VECTOR_BITS: int = torch.ops.mdt_fast.vector_bits() if library("cpu") else 0
"""Asked once, for torch.compile's sake: its graphs hold no op that returns a number."""


class _Ops:
    """A library's ops by the names of Triton's launches: ``CPU.bias_gelu_fwd`` is ``bias_gelu_fwd_cpu``."""

    def __init__(self, device: str) -> None:
        self._device = device

    def __getattr__(self, name: str) -> Any:
        op = getattr(torch.ops.mdt_fast, f"{name}_{self._device}").default
        setattr(self, name, op)  # found at once from now on
        return op


CPU = _Ops("cpu")
