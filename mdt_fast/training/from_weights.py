"""Weights files for sampling, opened like a run's checkpoint."""

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
from ..presets import PRESETS, VAE
from .checkpoint import EMA, MODEL, SavedModel
from .run import open_or_advise
from .settings import check_settings
from .states import model_of

SD_SCALE = 0.18215
"""The scaling factor of the published models' latents."""
WRITTEN = {"model": ModelConfig, "diffusion": DiffusionConfig, "sample": SampleConfig}
KINDS: dict[str, Any] = {
    **dict.fromkeys(WRITTEN, dict), "classes": list, "latents": dict | None, "step": int,
}  # fmt: skip
"""The metadata that ``mdt-fast convert`` writes with a run's weights, with types."""


@dataclass(frozen=True)
class WeightsFile(SavedModel):
    """``weights`` in float32. ``taken``: the published model that they are taken as; None: the file has its
    configuration."""

    weights: Mapping[str, Tensor]
    taken: str | None

    def note(self, part: str, instead: str = "") -> str | None:
        model = self.config.model
        blocks = f", {model.decode_layer} decoder blocks" if model.family == "mdt" else ""
        classes = f"{model.num_classes} classes" if self.config.data.conditional else "no classes"
        return self.taken and f"taken as the published {self.taken}: {classes}{blocks}"

    def tensors(self, part: str, prefix: str = "") -> dict[str, Tensor]:
        return {name: value for name, value in self.weights.items() if name.startswith(prefix)}


def open_for_drawing(path: Path, part: str, use: str) -> SavedModel:
    """:func:`~mdt_fast.training.run.open_or_advise` for ``part`` of a run, or open a weights file.

    A file that ``mdt-fast convert`` made from a run has the run's configuration; others are taken as
    published models, by their shape. ``UserError`` for weights of any other shape, damaged ones, and a part
    other than ``ema``, as a file has only one set of weights.
    """
    if path.is_dir() or path.suffix not in SUFFIXES:
        return open_or_advise(path, [part], use)
    if part != EMA:
        raise UserError(f"weights: {part!r} is for runs; {path} has one set of weights")
    weights = read_weights(path)
    said = what_is_said(path)
    config, taken = _config(path, weights, said)
    check_settings(config)
    check_sizes(config.model, weights, str(path))
    with torch.device("meta"):
        model = build_model(config.model)
    check_weights(model.state_dict(), weights, str(path))
    floats = {name: weights[name].float() for name, _ in model.named_parameters()}
    check_finite(floats, str(path))
    state = {
        "config": to_dict(config),
        "classes": said.get("classes", [str(i) for i in range(config.model.num_classes)]),
        "latents": _latents(path, config.model, said, taken),
        "step": said.get("step", 0),
        "files": {f"{EMA}/weights": {"sha256": sha256_of(path)}},
    }
    if not 1 <= len(state["classes"]) <= config.model.num_classes:
        raise UserError(
            f"{path}: has {len(state['classes'])} classes, but its model {config.model.num_classes}"
        )
    return WeightsFile(path, state, floats, taken)


def load_run(run: str | Path, weights: str = "ema") -> Transformer:
    """Load a run's model, on the CPU and in eval mode: with the EMA weights, or with ``weights`` "model"
    those of the last step.

    ``run``: its folder, one of its checkpoints (``run/checkpoints/step_0001000``), or a weights file, written
    by ``mdt-fast convert`` or published. ``UserError`` if it is missing or damaged, and for weights without
    a configuration that match no published shape.
    """
    if weights not in (EMA, MODEL):
        raise UserError(f"weights: got {weights!r}, expected ema or model")
    return model_of(open_for_drawing(Path(run), weights, "{}"), weights)


def said_by_weights(file: Path, weights: Mapping[str, Tensor]) -> tuple[dict[str, Any], int]:
    """The model's shape as read from the weights, and the number of rows of their label table."""
    try:
        return shape_of(weights), label_rows(weights)
    except KeyError as error:
        raise UserError(f"{file}: not weights of an MDT, MDTv2 or DiT (lacks {error})") from None
    except (ValueError, IndexError, ZeroDivisionError):
        raise UserError(f"{file}: not weights of an MDT, MDTv2 or DiT (shapes do not match)") from None


def written(beside: Mapping[str, str], name: str) -> dict[str, Any]:
    """A section of the configuration that ``convert`` wrote with a run's weights; {} if there is none."""
    try:
        values = json.loads(beside.get(name, "null"))
        return {} if values is None else to_dict(from_dict(WRITTEN[name], values))
    except (ValueError, RecursionError):  # metadata of another program
        return {}


def what_is_said(file: Path) -> dict[str, Any]:
    """The metadata that ``mdt-fast convert`` wrote with weights. ``UserError`` if it cannot be read."""
    beside = read_metadata(file) if file.suffix == ".safetensors" else {}
    said: dict[str, Any] = {}
    for name in (name for name in KINDS if name in beside):
        try:
            said[name] = value = json.loads(beside[name])
            if name in WRITTEN:
                said[name] = to_dict(from_dict(WRITTEN[name], value))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{file}: its {name!r} cannot be read: {error}") from None
        of_kind = isinstance(value, KINDS[name]) and type(value) is not bool
        if not of_kind or (name == "classes" and not all(isinstance(text, str) for text in value)):
            raise UserError(f"{file}: its {name!r} cannot be read: {str(value)[:60]}")
    return said


def published_preset(shape: Mapping[str, Any]) -> str | None:
    """The preset of the published model with this shape, or None."""
    wanted = ("family", "patch_size", "hidden_size", "depth")
    for name, preset in PRESETS.items():
        model = to_dict(preset.model)
        if "-" in name and all(model[key] == shape[key] for key in wanted):
            return name
    return None


def _config(
    file: Path, weights: Mapping[str, Tensor], said: Mapping[str, Any]
) -> tuple[RunConfig, str | None]:
    """The configuration of weights, and the published preset they are taken as if the file has none."""
    shape, rows = said_by_weights(file, weights)
    name, whole = published_preset(shape), "model" in said and "diffusion" in said
    if name is None and not whole:
        raise UserError(
            f"{file}: no published model has this shape, and the file has no configuration, unlike files "
            "from mdt-fast convert RUN FILE.safetensors; mdt-fast convert FILE RUN --preset NAME "
            "--data DATA makes a run of it"
        )
    preset = PRESETS[name or "images"]
    values = to_dict(preset)
    if "model" in said:
        values["model"] |= said["model"]
    else:
        dropout = preset.model.class_dropout_prob if rows > 1 else 0.0
        values["model"] |= {**shape, "num_classes": rows - (dropout > 0), "class_dropout_prob": dropout}
    for section in ("diffusion", "sample"):
        values[section] |= said.get(section, {})
    size, channels = values["model"]["input_size"], 1 if values["model"]["in_channels"] == 1 else 3
    values["data"] |= {"conditional": rows > 1, "channels": channels, "image_size": size}
    values["data"]["vae"] = None  # the latents name their own
    config: RunConfig = from_dict(RunConfig, values)
    if rows != config.model.num_classes + (config.model.class_dropout_prob > 0):
        raise UserError(
            f"{file}: its label table has {rows} rows, but its model {config.model.num_classes} classes"
        )
    if config.model.class_dropout_prob == 0:
        config = replace(config, sample=replace(config.sample, cfg_scale=1.0))
    return config, None if whole else name


def _latents(
    file: Path, model: ModelConfig, said: Mapping[str, Any], taken: str | None
) -> dict[str, Any] | None:
    """The description from which ``described_stage`` makes the first stage; None: pixels."""
    published = {"scale": SD_SCALE, "shift": 0.0, "vae": VAE, "fingerprint": None}
    found = said.get("latents", None if model.in_channels in (1, 3) else published)
    if found is None:
        return None
    if found is published and taken is None:
        raise UserError(f"{file}: does not say which autoencoder its latents are from; convert its run again")
    scale, shift, vae, fingerprint = (found.get(key) for key in published)
    numbers = all(type(number) in (int, float) and math.isfinite(number) for number in (scale, shift))
    if not numbers or scale <= 0 or not all(isinstance(text, str | None) for text in (vae, fingerprint)):
        raise UserError(f"{file}: its 'latents' cannot be read: {str(found)[:200]}")
    its = {key: found.get(key) for key in published}
    return {"channels": model.in_channels, "size": model.input_size, **its}
