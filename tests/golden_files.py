"""Reading ``tests/golden``: numbers of the official implementation (see ``tests/golden/README.md``)."""

import json
import math
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

FOLDER = Path(__file__).parent / "golden"
UPWARDS = {128: (12, 106)}
"""By number of time-embedding frequencies: those that the recording machine rounded up to the next float."""


def frequencies(number: int, max_period: float, device: torch.device) -> Tensor:
    """The frequencies of the recording machine. On others, PyTorch's ``exp`` rounds some of them differently,
    which moves even a float64 model's outputs by 1e-7: frequencies are float32 there, too."""
    places = torch.arange(number, dtype=torch.float32)
    rounded = (-math.log(max_period) * places / number).double().exp().float()
    for place in UPWARDS.get(number, ()):
        rounded[place] = torch.nextafter(rounded[place], torch.tensor(1.0))
    return rounded.to(device)


@cache
def _tensors(name: str) -> dict[str, Tensor]:
    return load_file(FOLDER / f"{name}.safetensors")


def load(name: str) -> dict[str, Tensor]:
    """The tensors of ``<name>.safetensors``; copies, so that a test may change them."""
    return {key: value.clone() for key, value in _tensors(name).items()}


@cache
def meta(name: str) -> dict[str, Any]:
    """The metadata of ``<name>.safetensors``; values that are JSON are decoded."""
    with safe_open(FOLDER / f"{name}.safetensors", framework="pt") as file:
        raw = file.metadata() or {}
    return {key: _decoded(value) for key, value in raw.items()}


def json_file(name: str) -> Any:
    """``<name>.json``, decoded."""
    return json.loads((FOLDER / f"{name}.json").read_text())


def _decoded(value: str) -> Any:
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return value
