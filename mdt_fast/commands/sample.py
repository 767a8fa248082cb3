"""``mdt-fast sample``."""

import argparse
import hashlib
import re
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from ..config import SHARD_SIZE, SampleConfig, from_dict, to_dict
from ..data import FirstStage, Latents, described_stage
from ..data.encode_folder import Ranks
from ..data.progress import ImageProgress
from ..errors import UserError, nearest
from ..files import remove_leftovers
from ..models.float8 import check_float8, use_float8
from ..sampling import (
    Inpainter,
    SampleFolder,
    Sampler,
    check_alone,
    check_inpainting,
    check_sampling,
    check_writable,
    grid,
    png_names,
    sampling_diffusion,
    save_npz,
    save_picture,
    save_pngs,
    shown,
    to_uint8,
)
from ..training.checkpoint import EMA, Checkpoint
from ..training.from_weights import WeightsFile, open_for_drawing
from ..training.optim import unripe
from ..training.run import resolve_device
from ..training.states import model_of
from .known import Known, check_known, digest_of, read_known
from .shared import refuse_empty, set_threads

FILES = (".png", ".jpg", ".jpeg", ".npz")
"""A name with one of these endings is meant to be a file."""
OPTIONS = (
    "num_samples", "steps", "cfg_scale", "sampler", "eta", "skip_below", "guided_channels", "dtype", "seed",
    "batch_size",
)  # fmt: skip


def sample(args: argparse.Namespace) -> int:
    set_threads(args.threads)
    refuse_empty(args, "npz", "grid", "png", "out", "image", "mask")
    check_known(args)
    ranks = Ranks.from_environment()
    opened = open_for_drawing(Path(args.run), args.weights, "mdt-fast sample {}")
    config = sample_config(args, opened.config.sample, opened.config.data.conditional)
    targets = _targets(args, ranks)
    model_config, out = opened.config.model, targets.get("out")
    check_sampling(model_config, config)
    if args.labels is not None and not opened.config.data.conditional:
        raise UserError("--labels: the run was trained without labels; leave it out")
    chosen = chosen_labels(args.labels, opened.classes, model_config.num_classes)
    labels = [chosen[i % len(chosen)] for i in range(config.num_samples)]
    if "png" in targets:
        beside = [path.name for path in targets.values() if path.parent == targets["png"]]
        check_alone(targets["png"], [*png_names(labels, opened.classes), *beside])
    diffusion = sampling_diffusion(model_config, opened.config.diffusion, config)
    device = resolve_device(args.device)
    if args.float8:
        if config.dtype != "bfloat16":
            raise UserError(f"--float8: needs --dtype bfloat16, got {config.dtype}")
        check_float8(device, model_config)
    data = opened.config.data if args.vae is None else replace(opened.config.data, vae=args.vae)
    latents = opened.state.get("latents")
    if args.vae is not None and latents is None:
        raise UserError("--vae: the run was trained on pixels and uses no autoencoder; leave it out")
    stage = described_stage(latents, data, device)
    known = None if args.image is None else read_known(args, stage, data.channels)
    resample = 1 if args.resample is None else args.resample
    how: dict[str, Any] = {"hide": args.hide or 0.0, "resample": resample}
    if known is not None:
        check_inpainting(model_config, config, known.unknown[None], **how)
    if args.shard_size is None:
        args.shard_size = SHARD_SIZE
    elif args.shard_size < 1:
        raise UserError(f"--shard-size: must be at least 1, got {args.shard_size}")
    elif out is None:
        raise UserError("--shard-size: needs --out, which is not given")
    folder = None
    if out is not None:
        folder = SampleFolder(out, _settings(opened, config, args, chosen), labels, args.shard_size)
        folder.prepare()
    todo = [] if folder is None else folder.missing(ranks.rank, ranks.world)
    there = 0 if folder is None else folder.drawn()
    console = Console(highlight=False, soft_wrap=True)
    averaged = args.weights == EMA and not isinstance(opened, WeightsFile)
    warning = unripe(opened.config.train.ema_decay, opened.step) if averaged else None
    if isinstance(opened, WeightsFile):
        warning = opened.note
    if warning is not None and ranks.rank == 0:
        console.print(warning, markup=False)
    if there and ranks.rank == 0:
        console.print(f"{there} of {len(labels)} images already exist")

    def drawn(spans: Sequence[range]) -> Generator[np.ndarray, None, None]:
        if isinstance(stage, Latents):
            stage.opened()  # report a missing autoencoder before sampling
        model = model_of(opened, args.weights).to(device)
        if args.float8:
            use_float8(model)
        sampler = (
            Sampler(model, diffusion, config, clip_denoised=stage.clip)
            if known is None
            else Inpainter(
                model, diffusion, config, known.image, known.unknown, clip_denoised=stage.clip, **how
            )
        )
        yield from draw(sampler, stage, labels, spans, config.batch_size, ranks, console, known)

    if folder is None and targets.keys() == {"npz"}:  # written batch by batch, none is kept in memory
        size, count = config.batch_size, len(labels)
        remove_leftovers(targets["npz"].parent, [targets["npz"].name])
        batches = drawn([range(first, min(first + size, count)) for first in range(0, count, size)])
        with closing(batches):
            made = _write(targets, batches, labels, opened.classes, known)
    elif folder is None:
        (images,) = drawn([range(len(labels))])
        made = _write(targets, images, labels, opened.classes, known)
    else:
        spans = [folder.span(shard) for shard in todo]
        for shard, images in zip(todo, drawn(spans) if todo else ()):
            folder.write(shard, images)
        made = _finish(folder, targets, opened.classes, known) if folder.complete else []
    if made:
        console.print(f"{len(labels)} images from {opened.path} in {', '.join(made)}", markup=False)
    elif ranks.rank == 0:
        count = sum(map(len, spans))
        console.print(
            f"{count} images drawn; other processes do the rest; if none is running, use the same command",
            markup=False,
        )
    return 0


def draw(
    sampler: Sampler,
    stage: FirstStage,
    labels: Sequence[int],
    spans: Sequence[range],
    batch_size: int,
    ranks: Ranks,
    console: Console,
    known: Known | None = None,
) -> Iterator[np.ndarray]:
    """Yield the images of each span, uint8 [n, H, W, C]. No batch crosses spans, so images do not depend on
    which other spans this process draws."""
    total, before = sum(map(len, spans)), 0
    with ImageProgress(total, ranks.world, console if ranks.rank == 0 else None, "sampling") as bar:
        for span in spans:
            pictures = []
            for first in range(span.start, span.stop, batch_size):
                batch = labels[first : min(first + batch_size, span.stop)]

                def on_step(step: int, of: int, before: int = before, n: int = len(batch)) -> None:
                    bar.update(before + n * step / of)

                images = to_uint8(stage.decode(sampler(batch, first, on_step)))
                pictures.append(images if known is None else known.paste(images))
                before += len(batch)
            yield np.concatenate(pictures)


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
            values["scale_pow"] = None if args.scale_pow == "none" else float(args.scale_pow)
        except ValueError:
            raise UserError(f"--scale-pow: a number or none is needed, got {args.scale_pow!r}") from None
    if args.cfg_interval is not None:
        try:
            low, high = map(float, args.cfg_interval.split(","))
        except ValueError:
            raise UserError(
                f"--cfg-interval: LOW,HIGH such as 0.1,0.7 or 100,700 is needed, got {args.cfg_interval!r}"
            ) from None
        values["cfg_interval"] = low, high
    if values["num_samples"] < 1:
        raise UserError(f"--num-samples: must be at least 1, got {values['num_samples']}")
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
                raise UserError(f"--labels: expected 0 to {num_classes - 1}, got {label}")
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
    if len({path.resolve() for path in targets.values()}) < len(targets):
        raise UserError(f"sample: {_listed([f'--{name}' for name in targets])} need different names")
    for name, path in targets.items():
        folder = name in ("png", "out")
        if folder and path.suffix.lower() in FILES and not path.is_dir():
            raise UserError(
                f"--{name}: expected a folder, got {str(path)!r}; --grid FILE is one image, --npz FILE arrays"
            )
        check_writable(path, folder=folder)
    for name, suffix in (("npz", ".npz"), ("grid", ".png")):
        if name in targets and targets[name].suffix.lower() != suffix:
            raise UserError(
                f"--{name}: a name that ends in {suffix} is needed, got {str(getattr(args, name))!r}"
            )
    return targets


def _settings(
    opened: Checkpoint, config: SampleConfig, args: argparse.Namespace, chosen: Sequence[int]
) -> dict[str, Any]:
    """Everything that the images depend on, except what only affects rounding (batch size, device)."""
    part = f"{args.weights}/"
    files = {name: file["sha256"] for name, file in opened.state["files"].items() if name.startswith(part)}
    digest = hashlib.sha256(repr(sorted(files.items())).encode()).hexdigest()
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
        "--shard-size": args.shard_size,
        "--image": args.image and digest_of(args.image),
        "--mask": args.mask and digest_of(args.mask),
        "--hide": args.image and (args.hide or 0.0),
        "--resample": args.image and (args.resample or 1),
    }


def _write(
    targets: dict[str, Path],
    images: np.ndarray | Iterator[np.ndarray],
    labels: Sequence[int],
    classes: Sequence[str],
    known: Known | None,
) -> list[str]:
    """Write the outputs. ``images``: an array, or for an .npz alone, batches drawn as they are written."""
    if "npz" in targets:
        try:
            save_npz(targets["npz"], images, labels)
        except OSError as error:
            raise UserError(
                f"--npz: cannot write {str(targets['npz'])!r}: {error.strerror or error}"
            ) from None
    if targets.keys() == {"npz"}:
        return [str(targets["npz"])]
    assert isinstance(images, np.ndarray)
    if "grid" in targets:
        save_picture(targets["grid"], grid(images, labels, classes, _before(known)))
    if "png" in targets:
        save_pngs(targets["png"], images, labels, classes)
    return list(map(str, targets.values()))


def _before(known: Known | None) -> list[np.ndarray]:
    return [] if known is None else known.shown()


def _finish(
    folder: SampleFolder, targets: dict[str, Path], classes: Sequence[str], known: Known | None
) -> list[str]:
    """Write the outputs made from all shards, once these are complete."""
    made = [str(folder.assemble())]
    if "grid" in targets:
        indices = shown(folder.labels)
        picked = [folder.labels[i] for i in indices]
        save_picture(targets["grid"], grid(folder.pick(indices), picked, classes, _before(known)))
        made.append(str(targets["grid"]))
    if "png" in targets:
        for shard, images in enumerate(folder.images()):
            span = folder.span(shard)
            part = folder.labels[span.start : span.stop]
            save_pngs(targets["png"], images, part, classes, first_index=span.start)
        made.append(str(targets["png"]))
    return made


def _listed(names: Sequence[str]) -> str:
    return f"{', '.join(names[:-1])} and {names[-1]}"
