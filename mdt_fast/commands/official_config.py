"""The configuration of a run made from the official loop's files or from weights."""

import argparse
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ..config import RunConfig, from_dict, to_dict
from ..data.latents import is_encoded
from ..errors import UserError
from ..models.convert import read_metadata
from ..models.zoo import shape_of as published_shape
from ..presets import PRESETS
from ..training.from_official import PackedOptimizer
from ..training.from_weights import published_preset, said_by_weights, written
from ..training.official_files import OfficialFiles
from ..training.optim import learning_rate
from .train import fit_to_encoded, named_preset, put, set_by_hand

RECIPE = ("preset", "config", "data", "image_size", "vae", "unconditional", "model", "set")
"""The options that set a configuration."""
FREE = ("num_classes", "input_size")
"""Settings in which a run may differ from the weights that it starts from."""


def official_config(
    args: argparse.Namespace,
    files: OfficialFiles,
    weights: Mapping[str, Tensor],
    packed: PackedOptimizer | None,
) -> tuple[RunConfig, list[str]]:
    """Build the configuration from a preset, then the files, then the user's settings; also returns notes.

    The weights give the model's shape, and a published shape its preset; the optimiser's state gives its
    kind, learning rate, weight decay and clipping norm; the EMA file's name gives its rate. ``UserError`` if
    the user's settings contradict the shape of the weights, and if no preset matches.
    """
    shape, rows = said_by_weights(files.model, weights)
    written, process, latents = _written_with(files)
    name, given = named_preset(args)
    source = args.data or given.get("data", {}).get("source")
    others = "digits" if source == "digits" else "images"  # digits are not mirrored
    preset = name or _published(shape, others if process else None)
    values = to_dict(PRESETS[preset])
    why = "by the shape of the weights" if preset != others else "as no published model has this shape"
    notes = [] if name else [f"preset {preset}, {why}"]
    if written:
        notes.append(f"the model{' and its diffusion' if process else ''}: as written in {files.model.name}")
        values["diffusion"] |= process
    hand = {(section, key): value for section, key, value in set_by_hand(args, given, values)}
    factory: dict[str, Any] = {}
    if args.model is not None:
        family, sizes = published_shape(args.model)
        factory = {k: v for k, v in {"family": family, **sizes}.items() if ("model", k) not in hand}
        hand = {("model", key): value for key, value in factory.items()} | hand
    by_hand = [(section, key, value) for (section, key), value in hand.items()]
    family = hand.get(("model", "family"), shape["family"] if name is None else values["model"]["family"])
    if family != shape["family"]:
        what = f"--preset: {preset!r} is a recipe for {family}"
        if ("model", "family") in hand:
            what = (
                f"--model: {args.model!r} is {family}" if "family" in factory else f"model.family: {family!r}"
            )
        raise UserError(f"{what}, but the weights in {files.model} are {shape['family']}")
    values["model"] |= {"family": family, **written}
    put(values, by_hand)
    fit_to_encoded(values)
    if not latents and (pixels := _pixels(values, shape, hand)):
        notes += _changed(values, "data", pixels, f"as in {files.model.name}")
    if not values["data"]["conditional"]:
        values["model"].update(class_dropout_prob=0.0)
        values["sample"].update(cfg_scale=1.0)
    put(values, by_hand)
    shape |= {key: value for key, value in written.items() if key not in ("mask_ratio", "class_dropout_prob")}
    without_classes = UserError(
        f"{files.model}: its label table has one row: a model without classes; pass --unconditional"
    )
    guided = values["data"]["conditional"] and values["sample"]["cfg_scale"] != 1
    if rows == 1 and guided and values["model"]["class_dropout_prob"] == 0:
        raise without_classes
    dropped = from_dict(RunConfig, values).model.class_dropout_prob > 0
    if written and dropped != (written["class_dropout_prob"] > 0) and ("model", "class_dropout_prob") in hand:
        wanted, null = hand["model", "class_dropout_prob"], "no null class" if dropped else "a null class"
        raise UserError(f"model.class_dropout_prob: {wanted!r}, but the weights in {files.model} have {null}")
    if rows == dropped:
        raise without_classes
    shape["num_classes"] = rows - dropped
    of_model = {key: value for (section, key), value in hand.items() if section == "model"}
    if packed is None and not values["data"]["conditional"]:
        of_model.setdefault("num_classes", 1)
    if packed is None:
        notes += _changed_by_hand(shape, of_model, dropped)
    shape.update({key: of_model[key] for key in shape if _makes_the_same(of_model, key, shape)})
    _check_by_hand(shape, of_model, files, args.model, factory)
    notes += _changed(values, "model", shape, f"as in {files.model.name}")
    rate = _rate(files, values["train"]["ema_decay"], ("train", "ema_decay") in hand)
    said = {} if rate is None else {"ema_decay": rate}
    if packed is not None:
        said |= _recipe(packed, from_dict(RunConfig, values), files.step)
    said = {key: value for key, value in said.items() if ("train", key) not in hand}
    notes += _changed(values, "train", said, "as in the files")
    return from_dict(RunConfig, values), notes


def _pixels(
    values: Mapping[str, Any], shape: Mapping[str, Any], hand: Mapping[tuple[str, str], Any]
) -> dict[str, Any]:
    """The images' size and channels that the weights of a model on pixels take, without those that the user
    set; {}: a model on latents."""
    channels, data = shape["in_channels"], from_dict(RunConfig, values).data
    encoded = data.source not in ("", "digits") and is_encoded(Path(data.source))
    if channels not in (1, 3) or data.vae is not None or encoded:
        return {}
    size = hand.get(("model", "input_size"), shape["input_size"])
    if data.source == "digits":
        size, channels = 8, 1
    taken = {"image_size": size, "channels": channels}
    return {key: value for key, value in taken.items() if ("data", key) not in hand}


def _check_by_hand(
    shape: dict[str, Any],
    hand: Mapping[str, Any],
    files: OfficialFiles,
    model: str | None,
    factory: Mapping[str, Any],
) -> None:
    """``UserError`` for a setting by the user that contradicts the shape of the weights. ``factory``: those
    that ``--model`` gave by naming ``model``."""
    for key, value in shape.items():
        if hand.get(key, value) != value:
            if key in factory:
                raise UserError(
                    f"--model: {model!r} has {key} {hand[key]}, but the weights in {files.model} have {value}"
                )
            others = "; without the optimiser's state it may differ" if key in FREE else ""
            raise UserError(
                f"model.{key}: {hand[key]!r}, but the weights in {files.model} have {value!r}{others}"
            )


def _changed_by_hand(shape: dict[str, Any], hand: Mapping[str, Any], dropped: bool) -> list[str]:
    """Put the user's settings that weights can be adapted to into the shape; returns a note for each."""
    done = {
        "num_classes": f"the label table is new{', except the null class' if dropped else ''}",
        "input_size": "position embeddings and bias tables are resized",
    }
    notes = []
    for key in FREE:
        wanted, there = hand.get(key, shape[key]), shape[key]
        if wanted != there:
            shape[key] = wanted
            notes.append(f"model.{key}: {wanted}, but the weights have {there}: {done[key]}")
    return notes


def _makes_the_same(hand: Mapping[str, Any], key: str, shape: dict[str, Any]) -> bool:
    """Whether a setting by the user differs from the value read from the weights and yet gives the same
    shape: a width that is rounded, or MDTv2's depth including the block that an odd number loses."""
    wanted, there = hand.get(key, shape[key]), shape[key]
    if type(wanted) not in (int, float) or wanted == there:
        return False
    if key == "mlp_ratio":
        return int(shape["hidden_size"] * wanted) == int(shape["hidden_size"] * there)
    return (
        key == "depth" and "decode_layer" in shape and wanted - (wanted - shape["decode_layer"]) % 2 == there
    )


def _written_with(files: OfficialFiles) -> tuple[dict[str, Any], dict[str, Any], bool]:
    """The model's configuration without its classes, and that of its diffusion process, as ``convert`` writes
    them into a file with a run's weights, both empty for other files; and whether it says that the model is
    for latents."""
    if files.model.suffix != ".safetensors":
        return {}, {}, False
    beside = read_metadata(files.model)
    model, process = written(beside, "model"), written(beside, "diffusion")
    sizes = {key: value for key, value in model.items() if key != "num_classes"}
    return sizes, process if model else {}, beside.get("latents", "null") != "null"


def _published(shape: dict[str, Any], other: str | None = None) -> str:
    """The preset of the published model with this shape, or else ``other``. ``UserError`` for neither."""
    if (name := published_preset(shape) or other) is not None:
        return name
    sizes = ", ".join(f"{key} {shape[key]}" for key in ("family", "patch_size", "hidden_size", "depth"))
    raise UserError(f"--preset: needed, as no published model has the shape of the weights ({sizes})")


def _rate(files: OfficialFiles, wanted: float, by_hand: bool) -> float | None:
    """The rate of the EMA to continue with; None: there is no EMA file."""
    rates = sorted(files.averages)
    if not rates or wanted in rates:
        return wanted if rates else None
    if len(rates) > 1 or by_hand:
        raise UserError(
            f"train.ema_decay: no EMA of rate {wanted} beside {files.model}, only of "
            f"{', '.join(map(str, rates))}; pass --set train.ema_decay={rates[-1]}"
        )
    return rates[0]


def _recipe(packed: PackedOptimizer, config: RunConfig, step: int) -> dict[str, Any]:
    """The training settings that can be read from the optimiser's state."""
    known: dict[str, Any] = {"optimizer": packed.kind, "weight_decay": packed.group["weight_decay"]}
    if "max_grad_norm" in packed.group:
        known["max_grad_norm"] = float(packed.group["max_grad_norm"])
    elif packed.kind != config.train.optimizer:
        known["max_grad_norm"] = 0.0  # the official loop does not clip for AdamW
    if learning_rate(replace(config.train, lr=1.0), step) == 1.0:  # no schedule has changed it
        known["lr"] = packed.group["lr"]
    return known


def _changed(values: dict[str, Any], section: str, said: dict[str, Any], where: str) -> list[str]:
    """Put the settings from the files into a section; returns a note on what that changes."""
    new = {key: value for key, value in said.items() if values[section][key] != value}
    before = ", ".join(f"{section}.{key} {value} (not {values[section][key]})" for key, value in new.items())
    values[section].update(said)
    return [f"{where}: {before}"] if new else []
