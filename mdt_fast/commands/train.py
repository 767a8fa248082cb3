"""``mdt-fast train``."""

import argparse
import json
import signal
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from rich.console import Console

from ..config import DataConfig, RunConfig, from_dict, setting_type, to_dict
from ..data import open_first_stage, open_images
from ..data.latents import LatentSet, is_encoded
from ..errors import UserError, nearest
from ..files import resolved
from ..models import zoo
from ..presets import PRESETS, decode_layer, published
from ..processes import Ranks
from ..training import train as run_training
from ..training.run import prepare, starting_point
from .config_file import as_yaml, read_config_file, read_saved_config
from .shared import refuse_empty, set_threads

OPTIONS = {
    "data": ("data", "source"), "image_size": ("data", "image_size"), "vae": ("data", "vae"),
    "steps": ("train", "steps"), "batch_size": ("train", "batch_size"), "lr": ("train", "lr"),
    "accumulate": ("train", "accumulate"), "dtype": ("train", "dtype"), "save_every": ("train", "save_every"),
    "seed": ("train", "seed"), "device": ("train", "device"),
}  # fmt: skip
"""The command's options that are settings, with section and key."""
Settings = list[tuple[str, str, Any]]
"""Section, key, value."""
PREEMPTION = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name))


def train(args: argparse.Namespace) -> int:
    set_threads(args.threads)
    console = Console(highlight=False, soft_wrap=True, quiet=Ranks.from_environment().rank > 0)
    refuse_empty(args, "out", "resume")
    out = Path(args.out)
    config, notes = train_config(args)
    if args.dry_run:
        run = prepare(config, out, args.resume)
        for note in notes:
            print(f"# {note}")
        parameters = sum(p.numel() for p in run.model.parameters())
        print(as_yaml(config), end="")
        print(
            f"# {config.model.family}: {parameters:,} parameters; {len(run.images.labels):,} images in "
            f"{len(run.images.classes)} classes; steps {run.step} to {config.train.steps} on {run.device}; "
            "nothing was written"
        )
        return 0
    for note in notes:
        console.print(note, markup=False)
    result = run_training(config, out, resume=args.resume, console=console)
    if result.signal is not None:
        console.print(
            f"stopped after {result.steps} steps, checkpoint saved in {out}; resume with --resume auto",
            markup=False,
        )
        # Cluster schedulers stop jobs with these signals, and a saved run is not a failure.
        return 0 if result.signal in PREEMPTION else 128 + result.signal
    console.print(f"{result.steps} steps done")
    for line in result.summary:
        console.print(line, markup=False)
    return 0


def train_config(args: argparse.Namespace) -> tuple[RunConfig, list[str]]:
    """The configuration to train with: a base, overridden by ``--config``, then the options, then ``--set``.
    Also returns notes to print.

    The base is the checkpoint's configuration when resuming, the run's ``config.json`` if ``--resume auto``
    finds a run that was killed before its first checkpoint, and otherwise the preset.
    """
    name, given = named_preset(args)
    start = starting_point(Path(args.out), args.resume)
    begun = Path(args.out) / "config.json"
    saved = start is not None and resolved(start.run) == resolved(Path(args.out))
    is_begun = not saved and args.resume == "auto" and begun.is_file()
    if is_begun:  # and was killed before its first checkpoint
        values = to_dict(read_saved_config(begun))
    elif start is not None:
        values = to_dict(start.config)
    else:
        values = to_dict(_preset(args, name, given))
    by_hand, family = set_by_hand(args, given, values), values["model"]["family"]
    own = {(section, key) for section, key, _ in by_hand}
    if name is not None and (is_begun or start is not None):
        run = begun.parent if is_begun or start is None else start.run
        _check_preset(name, args, own, values, run)
    put(values, by_hand)
    if args.model is not None or (start is None and not is_begun):  # a run's model is fitted already
        _fit_model_to_data(values, args, by_hand, family)
        put(values, by_hand)  # the user's settings override those derived from the data
    config = from_dict(RunConfig, values)
    kept = _kept(name, args, own, to_dict(config), begun) if is_begun and name is not None else []
    return config, kept


def named_preset(args: argparse.Namespace) -> tuple[str | None, dict[str, Any]]:
    """The preset that ``--preset`` or ``--config`` names, if any, and the settings of ``--config``."""
    preset, given = (None, {}) if args.config is None else read_config_file(Path(args.config))
    name = args.preset or preset
    if name is not None and name not in PRESETS:
        raise UserError(f"--preset: got {name!r}{nearest(name, PRESETS)}, expected {', '.join(PRESETS)}")
    return name, given


def set_by_hand(args: argparse.Namespace, given: dict[str, Any], values: dict[str, Any]) -> Settings:
    """Changes to ``values`` by ``given`` (from ``--config``), the options and ``--set``, in that order."""
    by_hand = [(section, key, value) for section, keys in given.items() for key, value in keys.items()]
    options = {name: getattr(args, name, None) for name in OPTIONS}  # convert has only some of them
    by_hand += [(*OPTIONS[name], value) for name, value in options.items() if value is not None]
    if args.unconditional:
        by_hand.append(("data", "conditional", False))
    return by_hand + [_setting(text, values) for text in args.set]


def put(values: dict[str, Any], settings: Settings) -> None:
    for section, key, value in settings:
        values[section][key] = value


def _check_preset(
    name: str, args: argparse.Namespace, own: set[tuple[str, str]], values: dict[str, Any], run: Path
) -> None:
    """A resumed run keeps its settings, ``values``; ``UserError`` if ``name`` is a published preset of
    another shape, apart from what the user sets (``own``)."""
    if name in ("digits", "images") or args.model is not None:  # their shapes are meant to be changed
        return
    for key in ("family", "depth", "hidden_size", "num_heads", "patch_size"):
        ours, theirs = getattr(PRESETS[name].model, key), values["model"][key]
        if ours != theirs and ("model", key) not in own:
            raise UserError(
                f"--preset: {name!r} has model.{key}={ours}, the run in {str(run)!r} has {theirs}; "
                "a resumed run keeps its own settings, a new one needs another --out"
            )


FITTED = {
    ("model", "input_size"), ("model", "in_channels"), ("model", "num_classes"),
    ("model", "class_dropout_prob"), ("data", "image_size"), ("data", "vae"), ("data", "flip"),
    ("sample", "cfg_scale"),
}  # fmt: skip
"""Settings that a new run may take from its data instead of the preset."""


def _kept(
    name: str, args: argparse.Namespace, own: set[tuple[str, str]], values: dict[str, Any], file: Path
) -> list[str]:
    """A note on the settings in ``values``, from the run's ``file``, that differ from the preset's."""
    preset = to_dict(PRESETS[name])
    if args.model is not None:
        _give_shape(preset, args.model, preset["model"]["family"])
    differing = [
        f"{section}.{key}={kept} (preset: {preset[section][key]})"
        for section, settings in values.items()
        for key, kept in settings.items()
        if kept != preset[section][key] and (section, key) not in own | FITTED
    ]
    if not differing:
        return []
    return [f"the settings in {file} are kept, not those of preset {name}: {', '.join(differing)}"]


def _preset(args: argparse.Namespace, name: str | None, given: dict[str, Any]) -> RunConfig:
    """The named preset, or the default for the images given by ``--data`` or in ``--config``."""
    source = args.data if args.data is not None else given.get("data", {}).get("source")
    if name is None and source is not None:
        name = "digits" if source == "digits" else "images"
    if name is None:
        raise UserError("train: nothing to train on; pass --preset digits or --data DIR")
    return PRESETS[name]


def _setting(text: str, values: dict[str, Any]) -> tuple[str, str, Any]:
    """Parse ``section.key=value``. Types are checked later."""
    path, equals, word = text.partition("=")
    section, dot, key = path.partition(".")
    if not (equals and dot):
        raise UserError(f"--set: got {text!r}, expected SECTION.KEY=VALUE")
    if section not in values:
        raise UserError(
            f"--set: no section {section!r}{nearest(section, values)}; known: {', '.join(values)}"
        )
    if key not in values[section]:
        keys = values[section]
        raise UserError(f"--set: no key {key!r} in {section}{nearest(key, keys)}; known: {', '.join(keys)}")
    return section, key, _value(word, setting_type(section, key))


def _value(word: str, kind: Any) -> Any:
    """What ``word`` means to a setting of type ``kind``: JSON (two numbers need no brackets), except that
    text is taken as it is typed, unless it is a JSON string."""
    if get_origin(kind) is Literal and word in get_args(kind):  # for some settings "none" is one
        return word
    text = word
    if kind is not str and word in ("none", "None"):
        text = "null"
    elif kind == tuple[float, float] | None and "," in word and not word.lstrip().startswith("["):
        text = f"[{word}]"
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return word
    typed = kind in (str, str | None) and not isinstance(value, str) and (value is not None or kind is str)
    return word if typed else value


def _fit_model_to_data(
    values: dict[str, Any], args: argparse.Namespace, by_hand: Settings, family: str
) -> None:
    """Set size, channels and classes from the data; ``--model`` names a published shape. ``family``: that of
    the preset, or of the resumed run."""
    if args.model is not None:
        _give_shape(values, args.model, family)
    fit_to_encoded(values)
    put(values, by_hand)
    images = open_images(from_dict(DataConfig, values["data"], "data"))
    stage = open_first_stage(from_dict(DataConfig, values["data"], "data"), images)
    values["model"].update(input_size=stage.size, in_channels=stage.channels)
    values["model"]["num_classes"] = len(images.classes)
    if not values["data"]["conditional"]:
        values["model"].update(class_dropout_prob=0.0)
        values["sample"].update(cfg_scale=1.0)


def _give_shape(values: dict[str, Any], name: str, before: str) -> None:
    """Set a factory's model shape; if the family changes, also the settings of its objective and guidance."""
    family, shape = zoo.shape_of(name)
    size = name.split("_")[1]
    values["model"].update(family=family, **shape, decode_layer=decode_layer(family, size))
    if family == before:
        return
    recipe = published(family, size, shape["patch_size"])
    values["model"]["mask_ratio"] = recipe.model.mask_ratio
    values["diffusion"]["min_snr_gamma"] = recipe.diffusion.min_snr_gamma
    if "dit" in (family, before):
        values["sample"]["scale_pow"] = recipe.sample.scale_pow


def fit_to_encoded(values: dict[str, Any]) -> None:
    """Set the data settings that encoded latents determine, if ``data.source`` is a folder of them."""
    source = from_dict(DataConfig, values["data"], "data").source
    if source not in ("", "digits") and is_encoded(Path(source)):  # a folder may be named digits, too
        encoded = LatentSet(Path(source))
        values["data"].update(image_size=encoded.image_size, vae=encoded.autoencoder, flip=encoded.mirrored)
