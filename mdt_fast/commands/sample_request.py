"""What ``mdt-fast sample`` is asked for, checked before anything is drawn or written."""

import argparse
import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..config import SHARD_SIZE, SampleConfig, from_dict, to_dict
from ..data import FirstStage, described_stage
from ..diffusion import GaussianDiffusion
from ..errors import UserError, nearest
from ..files import resolved
from ..models.float8 import check_float8
from ..processes import Ranks, resolve_device
from ..sampling import (
    SampleFolder,
    check_alone,
    check_inpainting,
    check_sampling,
    check_writable,
    png_names,
    sampling_diffusion,
)
from ..sampling.guided import as_published
from ..training.checkpoint import EMA, SavedModel
from ..training.from_weights import open_for_drawing
from .known import Known, check_known, digest_of, read_known
from .shared import refuse_empty

FILES = (".png", ".jpg", ".jpeg", ".npz")
"""A name with one of these endings is meant to be a file."""
OPTIONS = (
    "num_samples", "steps", "cfg_scale", "sampler", "eta", "skip_below", "guided_channels", "dtype", "seed",
    "batch_size",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Request:
    """Images of ``labels``, one class index each, drawn with the weights of ``opened``.

    ``weights``: the part of a run to draw with. ``targets``: files and folders to write, by option;
    ``folder``: that of ``--out``, which several processes share.
    ``known``: the image to complete, with :class:`~mdt_fast.sampling.Inpainter`'s options ``inpainting``.
    """

    opened: SavedModel
    config: SampleConfig
    labels: list[int]
    targets: dict[str, Path]
    folder: SampleFolder | None
    diffusion: GaussianDiffusion
    device: torch.device
    stage: FirstStage
    known: Known | None
    inpainting: dict[str, Any]
    weights: str
    float8: bool


def requested(args: argparse.Namespace, ranks: Ranks) -> Request:
    """Check all options and open what they name; ``--out``'s folder is made here. ``UserError`` names the
    option."""
    refuse_empty(args, "npz", "grid", "png", "out", "image", "mask")
    check_known(args)
    opened = open_for_drawing(Path(args.run), args.weights, "mdt-fast sample {}")
    data, model_config = opened.config.data, opened.config.model
    config = sample_config(args, opened.config.sample, data.conditional)
    targets = _targets(args, ranks)
    check_sampling(model_config, config)
    if args.labels is not None and not data.conditional:
        raise UserError("--labels: the run was trained without labels; leave it out")
    chosen = chosen_labels(args.labels, opened.classes, model_config.num_classes)
    labels = [chosen[i % len(chosen)] for i in range(config.num_samples)]
    pngs = png_names(labels, opened.classes) if "png" in targets else []
    _check_no_input(args, [*targets.values(), *(targets["png"] / name for name in pngs)])
    if "png" in targets:
        beside = [path.name for path in targets.values() if path.parent == targets["png"]]
        check_alone(targets["png"], [*pngs, *beside])
    diffusion = sampling_diffusion(model_config, opened.config.diffusion, config)
    device = resolve_device(args.device)
    if args.float8:
        if config.dtype != "bfloat16":
            raise UserError(f"--float8: needs --dtype bfloat16, got {config.dtype}")
        check_float8(device, model_config)
    latents = opened.state.get("latents")
    if args.vae is not None:
        if latents is None:
            raise UserError("--vae: the run was trained on pixels and uses no autoencoder; leave it out")
        data = replace(data, vae=args.vae)
    stage = described_stage(latents, data, device)
    known = None if args.image is None else read_known(args, stage, data.channels)
    resample = 1 if args.resample is None else args.resample
    inpainting: dict[str, Any] = {"hide": args.hide or 0.0, "resample": resample}
    if known is not None:
        check_inpainting(model_config, config, known.unknown[None], **inpainting)
    shard_size = _shard_size(args)
    folder = None
    if "out" in targets:
        settings = _settings(opened, config, args, chosen, shard_size)
        folder = SampleFolder(targets["out"], settings, labels, shard_size)
        folder.prepare()
    return Request(
        opened, config, labels, targets, folder, diffusion, device, stage, known, inpainting,
        args.weights, args.float8,
    )  # fmt: skip


def _check_no_input(args: argparse.Namespace, written: Sequence[Path]) -> None:
    """``UserError`` if the image or the mask would be overwritten."""
    for name in ("image", "mask"):
        file = getattr(args, name)
        if file is not None and resolved(Path(file)) in {resolved(path) for path in written}:
            raise UserError(f"--{name}: got {file!r}, which would be overwritten; choose another output")


def _shard_size(args: argparse.Namespace) -> int:
    if args.shard_size is None:
        return SHARD_SIZE
    if args.shard_size < 1:
        raise UserError(f"--shard-size: got {args.shard_size}, expected 1 or more")
    if args.out is None:
        raise UserError("--shard-size: needs --out, which is not given")
    return args.shard_size


def sample_config(args: argparse.Namespace, base: SampleConfig, conditional: bool = True) -> SampleConfig:
    """The run's sampling settings, overridden by the options."""
    values = to_dict(base)
    if not conditional:
        if args.cfg_scale not in (None, 1):
            raise UserError(
                f"--cfg-scale: the run was trained without labels, so it cannot be guided; use 1, "
                f"got {args.cfg_scale:g}"
            )
        values["cfg_scale"] = 1.0
    for name in OPTIONS:
        if getattr(args, name) is not None:
            values[name] = getattr(args, name)
    if args.scale_pow is not None:
        try:
            named = {"none": None, "auto": "auto"}
            values["scale_pow"] = named[args.scale_pow] if args.scale_pow in named else float(args.scale_pow)
        except ValueError:
            raise UserError(f"--scale-pow: got {args.scale_pow!r}, expected a number, none or auto") from None
    if args.cfg_interval is not None:
        try:
            low, high = map(float, args.cfg_interval.split(","))
        except ValueError:
            raise UserError(
                f"--cfg-interval: got {args.cfg_interval!r}, expected LOW,HIGH such as 0.1,0.7 or 100,700"
            ) from None
        values["cfg_interval"] = low, high
    if values["num_samples"] < 1:
        raise UserError(f"--num-samples: got {values['num_samples']}, expected 1 or more")
    return from_dict(SampleConfig, values, "sample")


def chosen_labels(text: str | None, classes: Sequence[str], num_classes: int) -> list[int]:
    """The classes that ``text`` lists by name or index ("3,7", "cat,zebra, striped"; names take precedence),
    or all classes of the data."""
    if text is None:
        return list(range(len(classes)))
    chosen = []
    for name in _words(text, classes):
        if re.fullmatch(r"-?\d+", name) and name not in classes:
            label = int(name)
            if not 0 <= label < num_classes:
                raise UserError(f"--labels: got {label}, expected 0 to {num_classes - 1}")
        elif name in classes:
            label = list(classes).index(name)
        else:
            raise UserError(
                f"--labels: {name!r} is not a class{nearest(name, classes)}; use indices or names such as "
                f"{classes[0]}"
            )
        chosen.append(label)
    return chosen


def _words(text: str, classes: Sequence[str]) -> Iterator[str]:
    """Split ``text`` at commas, except commas that are part of a class name."""
    pieces, names, at = text.split(","), {*classes}, 0
    most = 1 + max((name.count(",") for name in names), default=0)
    while at < len(pieces):
        longest = min(most, len(pieces) - at)
        ends = (n for n in range(longest, 1, -1) if ",".join(pieces[at : at + n]).strip() in names)
        end = at + next(ends, 1)
        yield ",".join(pieces[at:end]).strip()
        at = end


def _targets(args: argparse.Namespace, ranks: Ranks) -> dict[str, Path]:
    """The outputs to write, by option; checked before anything is drawn."""
    targets = {name: Path(value) for name in ("npz", "grid", "png", "out") if (value := getattr(args, name))}
    if not targets:
        if not (Path(args.run) / "checkpoints").is_dir():
            raise UserError("sample: nothing to write; pass --npz FILE, --grid FILE, --png DIR or --out DIR")
        targets["grid"] = Path(args.run) / "grid.png"
    if "out" in targets and "npz" in targets:
        raise UserError("--npz: --out already writes a samples_....npz in its folder; pass only one of them")
    if "out" not in targets and ranks.world > 1:
        raise UserError("--out: required with several processes, which share a folder of shards")
    if len({resolved(path) for path in targets.values()}) < len(targets):
        raise UserError(f"sample: {_listed([f'--{name}' for name in targets])} need different names")
    for name, path in targets.items():
        folder = name in ("png", "out")
        if folder and path.suffix.lower() in FILES and not path.is_dir():
            raise UserError(
                f"--{name}: got {str(path)!r}, expected a folder; --grid FILE is one image, --npz FILE arrays"
            )
        check_writable(path, folder=folder)
    for name in ("grid", "png"):
        if (
            "out" in targets
            and name in targets
            and resolved(targets["out"]) in resolved(targets[name]).parents
        ):
            raise UserError(
                f"--{name}: got {str(targets[name])!r}, expected a place outside --out, which would refuse "
                "to be resumed with other files in it"
            )
    for name, suffix in (("npz", ".npz"), ("grid", ".png")):
        if name in targets and targets[name].suffix.lower() != suffix:
            raise UserError(
                f"--{name}: got {str(getattr(args, name))!r}, expected a name that ends in {suffix}"
            )
    return targets


def _settings(
    opened: SavedModel,
    config: SampleConfig,
    args: argparse.Namespace,
    chosen: Sequence[int],
    shard_size: int,
) -> dict[str, Any]:
    """Everything that the images depend on, except what only affects rounding (batch size, device)."""
    part = f"{args.weights}/"
    files = {name: file["sha256"] for name, file in opened.state["files"].items() if name.startswith(part)}
    digest = hashlib.sha256(repr(sorted(files.items())).encode()).hexdigest()
    config = as_published(config, opened.config.model)
    values = {f"--{name.replace('_', '-')}": value for name, value in to_dict(config).items()}
    del values["--batch-size"]
    if config.guided_channels is None and opened.config.model.in_channels > 4:  # older folders: three
        values["--guided-channels"] = opened.config.model.in_channels
    return {
        "--weights": None if args.weights == EMA else args.weights,  # older folders have none
        "checkpoint": f"step {opened.step}, weights {digest[:16]}",
        **values,
        "--float8": True if args.float8 else None,  # older folders have none
        "--labels": list(chosen),
        "--vae": args.vae,
        "--shard-size": shard_size,
        "--image": args.image and digest_of(args.image),
        "--mask": args.mask and digest_of(args.mask),
        "--hide": args.image and (args.hide or 0.0),
        "--resample": args.image and (args.resample or 1),
    }


def _listed(names: Sequence[str]) -> str:
    return f"{', '.join(names[:-1])} and {names[-1]}"
