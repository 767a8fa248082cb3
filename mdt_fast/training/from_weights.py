"""A file of weights, for what draws: opened as a run's checkpoint is."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import DiffusionConfig, ModelConfig, RunConfig, SampleConfig, from_dict, to_dict
from ..errors import UserError
from ..files import sha256_of
from ..models import Transformer
from ..models.convert import (
    SUFFIXES,
    check_finite,
    check_sizes,
    check_weights,
    label_rows,
    read_metadata,
    read_weights,
    shape_of,
)
from ..models.zoo import build_model
from ..presets import PRESETS
from .checkpoint import EMA, MODEL, Checkpoint
from .run import open_or_advise
from .states import model_of

SD_SCALE = 0.18215
"""What the latents of the published models were multiplied by."""
WRITTEN = {"model": ModelConfig, "diffusion": DiffusionConfig, "sample": SampleConfig}


@dataclass(frozen=True)
class WeightsFile(Checkpoint):
    """``weights`` in float32, with what a checkpoint's ``state.json`` would say of them."""

    weights: Mapping[str, Tensor]

    def tensors(self, part: str, prefix: str = "") -> dict[str, Tensor]:
        return {name: value for name, value in self.weights.items() if name.startswith(prefix)}


def open_for_drawing(path: Path, part: str, use: str) -> Checkpoint:
    """:func:`~mdt_fast.training.run.open_or_advise` for ``part`` of a run, or a file of weights.

    A file that ``mdt-fast convert`` wrote of a run says all that the run does; others are taken as published
    models, by their shape. ``UserError`` for weights of another shape, damaged ones, and another part than
    ``ema``, of which a file has but the one.
    """
    if path.is_dir() or path.suffix not in SUFFIXES:
        return open_or_advise(path, [part], use)
    if part != EMA:
        raise UserError(f"weights: {part!r} is of a run; {path} has one set of weights")
    weights = read_weights(path)
    beside = read_metadata(path) if path.suffix == ".safetensors" else {}
    config, latents = _config(path, weights, beside)
    check_sizes(config.model, weights, str(path))
    with torch.device("meta"):
        check_weights(build_model(config.model).state_dict(), weights, str(path))
    check_finite(weights, str(path))
    classes = _json(beside, "classes", list) or [str(i) for i in range(config.model.num_classes)]
    if len(classes) > config.model.num_classes or not all(isinstance(name, str) for name in classes):
        raise UserError(
            f"{path}: what it says of its classes is not of {config.model.num_classes}, as the model has"
        )
    state = {
        "config": to_dict(config),
        "classes": classes,
        "latents": latents,
        "step": _json(beside, "step", int) or 0,
        "files": {f"{EMA}/{path.name}": {"sha256": sha256_of(path)}},
    }
    floats = {name: v.float() if v.is_floating_point() else v for name, v in weights.items()}
    return WeightsFile(path, state, floats)


def load_run(run: str | Path, weights: str = "ema") -> Transformer:
    """The model that a run has trained, on the CPU and in eval mode: with the averaged weights, or with
    ``weights`` "model" those of the last step.

    ``run``: its folder, one of its checkpoints (``run/checkpoints/step_0001000``), or a file of weights, as
    ``mdt-fast convert`` writes them and models were published. ``UserError`` if there is none, or it is
    damaged, and for weights of no published shape that do not say theirs.
    """
    if weights not in (EMA, MODEL):
        raise UserError(f"weights: allowed are ema and model, got {weights!r}")
    return model_of(open_for_drawing(Path(run), weights, "{}"), weights)


def said_by_weights(file: Path, weights: Mapping[str, Tensor]) -> tuple[dict[str, Any], int]:
    """What the weights say of the model's shape, and the rows of their label table."""
    try:
        return shape_of(weights), label_rows(weights)
    except (KeyError, ValueError, IndexError) as error:
        raise UserError(f"{file}: no weights of an MDT, MDTv2 or DiT (lacks {error})") from None


def written(beside: Mapping[str, str], name: str) -> dict[str, Any]:
    """A section of the configuration that ``convert`` has written beside a run's weights; of others {}."""
    values = _json(beside, name, dict)
    try:
        return {} if values is None else to_dict(from_dict(WRITTEN[name], values))
    except UserError:  # another's, who has other things to say
        return {}


def published_preset(shape: Mapping[str, Any]) -> str | None:
    """The preset of a published model of this shape."""
    wanted = ("family", "patch_size", "hidden_size", "depth")
    for name, preset in PRESETS.items():
        model = to_dict(preset.model)
        if "-" in name and all(model[key] == shape[key] for key in wanted):
            return name
    return None


def _config(
    file: Path, weights: Mapping[str, Tensor], beside: Mapping[str, str]
) -> tuple[RunConfig, dict[str, Any] | None]:
    """The configuration of weights, and what they say of their latents (None: pixels)."""
    shape, rows = said_by_weights(file, weights)
    model, process = written(beside, "model"), written(beside, "diffusion")
    name = published_preset(shape)
    if name is None and not (model and process):
        raise UserError(
            f"{file}: no published model has this shape, and the file does not say its configuration, as "
            "those of mdt-fast convert RUN FILE.safetensors do; mdt-fast convert FILE RUN makes a run of it"
        )
    preset = PRESETS[name or "images"]
    dropout = model.get("class_dropout_prob", preset.model.class_dropout_prob if rows > 1 else 0.0)
    shape |= {"num_classes": rows - (dropout > 0), "class_dropout_prob": dropout}
    values = to_dict(preset)
    values["model"] |= model or shape
    values["diffusion"] |= process
    values["sample"] |= written(beside, "sample")
    values["data"] |= {"conditional": rows > 1, "channels": 1 if values["model"]["in_channels"] == 1 else 3}
    values["data"] |= {"image_size": values["model"]["input_size"], "vae": None}  # the latents name theirs
    config: RunConfig = from_dict(RunConfig, values)
    if dropout == 0:
        config = replace(config, sample=replace(config.sample, cfg_scale=1.0))
    said = _json(beside, "latents", dict)
    if said is None and config.model.in_channels in (1, 3):
        return config, None
    said = said or {"scale": SD_SCALE, "shift": 0.0, "vae": preset.data.vae}
    scale, shift, vae, fingerprint = (said.get(key) for key in ("scale", "shift", "vae", "fingerprint"))
    numbers = all(isinstance(number, int | float) and math.isfinite(number) for number in (scale, shift))
    if not numbers or not scale or not all(isinstance(text, str | None) for text in (vae, fingerprint)):
        raise UserError(f"{file}: what it says of its latents is damaged: {said}")
    return config, {
        "channels": config.model.in_channels, "size": config.model.input_size,
        "scale": scale, "shift": shift, "vae": vae, "fingerprint": fingerprint,
    }  # fmt: skip


def _json(beside: Mapping[str, str], name: str, kind: type) -> Any:
    """A value that stands beside the weights, or None where there is none of this kind."""
    try:
        value = json.loads(beside.get(name, "null"))
    except ValueError:
        return None
    return value if isinstance(value, kind) else None
