"""A run small enough to train in a test: 8x8 digits, 3 thousand parameters."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors import deserialize

from mdt_fast.config import RunConfig
from mdt_fast.kernels.native import MISSING, library
from mdt_fast.presets import PRESETS

MODEL = {"hidden_size": 16, "depth": 2, "num_heads": 2, "decode_layer": 0, "patch_size": 4}
LEAN = {"dtype": "bfloat16", "weights": "bfloat16", "moments": "bfloat16"}
"""Training settings with as much as possible in bfloat16; they need the ops of ``csrc/``."""
needs_csrc = pytest.mark.skipif(not library("cpu"), reason=f"the C++ ops are {MISSING['cpu']}")
ARGUMENTS = [f"--set=model.{key}={value}" for key, value in MODEL.items()]
"""Command-line options that make ``mdt-fast train --preset digits`` tiny."""


def tiny(**train: Any) -> RunConfig:
    """The digits preset with a tiny model; ``train`` overrides training settings."""
    preset = PRESETS["digits"]
    settings = {"steps": 8, "batch_size": 4, "save_every": 4, "log_every": 3, "device": "cpu", **train}
    return replace(
        preset,
        model=replace(preset.model, **MODEL),
        train=replace(preset.train, **settings),
        sample=replace(preset.sample, steps=3, num_samples=4),
    )


def tensors_of(checkpoint: Path) -> dict[str, tuple[Any, ...]]:
    """Dtype, shape and bytes of every tensor of a checkpoint, to compare bit for bit.

    The files themselves may differ: the order of their metadata varies.
    """
    return {
        f"{file}: {name}": (entry["dtype"], tuple(entry["shape"]), bytes(entry["data"]))
        for file, content in files_of(checkpoint).items()
        for name, entry in deserialize(content)
    }


def files_of(checkpoint: Path) -> dict[str, bytes]:
    """The tensor files of a checkpoint."""
    files = sorted(checkpoint.glob("*/*.safetensors"))
    return {path.relative_to(checkpoint).as_posix(): path.read_bytes() for path in files}


def file_of(part: str) -> str:
    """The file of ``model``, ``ema`` or ``optimizer`` in a checkpoint that one process wrote."""
    return f"{part}/shard-00001-model-00001-of-00001.safetensors"
