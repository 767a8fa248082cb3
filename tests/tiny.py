"""A run small enough to train in a test: 8x8 digits, 3 thousand parameters."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from mdt_fast.config import PRESETS, RunConfig

MODEL = {"hidden_size": 16, "depth": 2, "num_heads": 2, "decode_layer": 0, "patch_size": 4}
ARGUMENTS = [f"--set=model.{key}={value}" for key, value in MODEL.items()]
"""Command-line options that make ``mdt-fast train --preset digits`` tiny."""


def tiny(**train: Any) -> RunConfig:
    """The digits preset with a tiny model; ``train`` replaces training settings."""
    preset = PRESETS["digits"]
    settings = {"steps": 8, "batch_size": 4, "save_every": 4, "log_every": 3, "device": "cpu", **train}
    return replace(
        preset,
        model=replace(preset.model, **MODEL),
        train=replace(preset.train, **settings),
        sample=replace(preset.sample, steps=3, num_samples=4),
    )


def files_of(checkpoint: Path) -> dict[str, bytes]:
    """The tensor files of a checkpoint, to compare bit for bit."""
    return {path.name: path.read_bytes() for path in sorted(checkpoint.glob("*.safetensors"))}
