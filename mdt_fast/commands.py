"""What the commands do, once their arguments are parsed."""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

from .config import PRESETS, DataConfig, RunConfig, SampleConfig, from_dict, to_dict
from .data import open_images
from .errors import UserError, nearest
from .models import zoo
from .models.convert import load_weights, read_weights, write_weights
from .sampling import (
    check_sampling,
    check_writable,
    grid,
    sampling_diffusion,
    save_npz,
    save_picture,
    save_pngs,
    to_uint8,
)
from .sampling import sample as draw
from .training import checkpoint
from .training import train as run_training
from .training.progress import describe_loss
from .training.run import open_or_advise, prepare, resolve_device, starting_point


def train(args: argparse.Namespace) -> int:
    _set_threads(args.threads)
    console = Console(highlight=False, soft_wrap=True)
    _refuse_empty(args, "out")
    out = Path(args.out)
    config = train_config(args)
    if args.dry_run:
        run = prepare(config, out, args.resume)
        parameters = sum(p.numel() for p in run.model.parameters())
        print(json.dumps(to_dict(config), indent=1))
        print(
            f"{config.model.family}: {parameters:,} parameters; {len(run.images.labels):,} images in "
            f"{len(run.images.classes)} classes; steps {run.step} to {config.train.steps} on {run.device}; "
            "nothing was written"
        )
        return 0
    result = run_training(config, out, resume=args.resume, console=console)
    if result.signal is not None:
        console.print(
            f"stopped after {result.steps} steps, checkpoint saved; go on with --resume auto", markup=False
        )
        return 128 + result.signal
    loss = f", {describe_loss(result.row)}" if result.row else ""
    made = [name for name in ("samples.png", "loss.png") if (out / name).exists()]
    console.print(
        f"{result.steps} steps done{loss}, {result.seconds:.0f} s; "
        f"in {out}: {', '.join([*made, 'metrics.jsonl', 'checkpoints/'])}",
        markup=False,
    )
    return 0


def train_config(args: argparse.Namespace) -> RunConfig:
    """The configuration to train with, the options put on top.

    It starts from the checkpoint's when resuming, from the run's ``config.json`` where ``--resume auto``
    finds a run that was killed before its first checkpoint, else from the preset's.
    """
    name = args.preset
    if name is not None and name not in PRESETS:
        raise UserError(
            f"--preset: {name!r} is not known{nearest(name, PRESETS)}; known: {', '.join(PRESETS)}"
        )
    start = starting_point(Path(args.out), args.resume)
    begun = Path(args.out) / "config.json"
    if start is not None:
        values = to_dict(start.config)
    elif args.resume == "auto" and name is None and args.data is None and begun.is_file():
        values = to_dict(_read_config(begun))
    else:
        values = to_dict(_preset(args))
    for option, section, key in (
        ("data", "data", "source"), ("image_size", "data", "image_size"), ("steps", "train", "steps"),
        ("batch_size", "train", "batch_size"), ("lr", "train", "lr"), ("save_every", "train", "save_every"),
        ("seed", "train", "seed"), ("device", "train", "device"),
    ):  # fmt: skip
        if getattr(args, option) is not None:
            values[section][key] = getattr(args, option)
    settings = [_setting(text, values) for text in args.set]
    for section, key, value in settings:
        values[section][key] = value
    if start is None or args.model is not None:
        _fit_model_to_data(values, args.model)
        for section, key, value in settings:  # what was set by hand wins over what follows from the data
            values[section][key] = value
    return from_dict(RunConfig, values)


def _read_config(path: Path) -> RunConfig:
    try:
        values = json.loads(path.read_text(errors="replace"))
    except (ValueError, RecursionError):
        raise UserError(f"{path}: truncated or edited, it is not JSON") from None
    return from_dict(RunConfig, values, str(path))


def _preset(args: argparse.Namespace) -> RunConfig:
    name = args.preset or ("images" if args.data is not None else None)
    if name is None:
        raise UserError("train: nothing to train on; pass --preset digits or --data DIR")
    return PRESETS[name]


def _set_threads(threads: int | None) -> None:
    if threads is None:
        return
    if threads < 1:
        raise UserError(f"--threads: must be at least 1, got {threads}")
    torch.set_num_threads(threads)


def _refuse_empty(args: argparse.Namespace, *names: str) -> None:
    for name in names:
        if getattr(args, name) == "":
            raise UserError(f"--{name}: a name is needed, got ''")


def _setting(text: str, values: dict[str, Any]) -> tuple[str, str, Any]:
    """``section.key=value``; the value is read as JSON, or else as a word. Types are checked later."""
    path, equals, word = text.partition("=")
    section, dot, key = path.partition(".")
    if not (equals and dot):
        raise UserError(f"--set: expected SECTION.KEY=VALUE, got {text!r}")
    if section not in values:
        raise UserError(
            f"--set: no section {section!r}{nearest(section, values)}; there are {', '.join(values)}"
        )
    if key not in values[section]:
        keys = values[section]
        raise UserError(
            f"--set: no key {key!r} in {section}{nearest(key, keys)}; there are {', '.join(keys)}"
        )
    try:
        return section, key, json.loads({"none": "null", "None": "null"}.get(word, word))
    except (ValueError, RecursionError):
        return section, key, word


def _fit_model_to_data(values: dict[str, Any], model: str | None) -> None:
    """Image size, channels and classes follow from the data; ``model`` names a published shape."""
    if model is not None:
        family, shape = zoo.shape_of(model)
        values["model"].update(family=family, **shape)
        values["model"]["decode_layer"] = {"mdtv2": 6 if "_S_" in model else 4, "mdt": 2, "dit": 0}[family]
        if family != "mdtv2":
            values["diffusion"]["min_snr_gamma"] = None
    data = from_dict(DataConfig, values["data"], "data")
    values["model"].update(input_size=data.image_size, in_channels=data.channels)
    values["model"]["num_classes"] = len(open_images(data).classes)


def sample(args: argparse.Namespace) -> int:
    _set_threads(args.threads)
    _refuse_empty(args, "npz", "grid", "png")
    opened = open_or_advise(Path(args.run), [checkpoint.WEIGHTS["ema"]], "mdt-fast sample {}")
    config = sample_config(args, opened.config.sample)
    grid_file = Path(args.grid) if args.grid else None
    if not (args.npz or args.grid or args.png):
        if not (Path(args.run) / "checkpoints").is_dir():
            raise UserError("sample: nothing to write; pass --npz FILE, --grid FILE or --png DIR")
        grid_file = Path(args.run) / "grid.png"
    npz_file, png_folder = (Path(name) if name else None for name in (args.npz, args.png))
    targets = [path for path in (npz_file, grid_file, png_folder) if path is not None]
    if len({path.resolve() for path in targets}) < len(targets):
        raise UserError("sample: --npz, --grid and --png need different names")
    for path in targets:
        check_writable(path, folder=path is png_folder)
    model_config = opened.config.model
    check_sampling(model_config, config)
    labels = _labels(args.labels, config.num_samples, model_config.num_classes, len(opened.classes))
    diffusion = sampling_diffusion(model_config, opened.config.diffusion, config)
    model = zoo.build_model(model_config)
    load_weights(model, opened.tensors(checkpoint.WEIGHTS["ema"]), str(opened.path))
    model.to(resolve_device(args.device))

    console = Console(highlight=False, soft_wrap=True)
    steps = opened.config.diffusion.diffusion_steps
    with Progress(console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("sampling", total=len(labels))
        images = to_uint8(
            draw(
                model, diffusion, labels, config, diffusion_steps=steps,
                on_batch=lambda done: progress.update(task, completed=done),
            )
        )  # fmt: skip
    written = []
    if npz_file is not None:
        save_npz(npz_file, images, labels)
        written.append(args.npz)
    if grid_file is not None:
        save_picture(grid_file, grid(images, labels, opened.classes))
        written.append(str(grid_file))
    if png_folder is not None:
        save_pngs(png_folder, images, labels, opened.classes)
        written.append(args.png)
    console.print(f"{len(labels)} images from {opened.path} in {', '.join(written)}", markup=False)
    return 0


def sample_config(args: argparse.Namespace, base: SampleConfig) -> SampleConfig:
    """The run's sampling settings with the options put on top."""
    values = to_dict(base)
    for name in ("num_samples", "steps", "cfg_scale", "sampler", "seed", "batch_size"):
        if getattr(args, name) is not None:
            values[name] = getattr(args, name)
    if args.scale_pow is not None:
        try:
            values["scale_pow"] = None if args.scale_pow == "none" else float(args.scale_pow)
        except ValueError:
            raise UserError(f"--scale-pow: a number or none is needed, got {args.scale_pow!r}") from None
    if values["num_samples"] < 1:
        raise UserError(f"--num-samples: must be at least 1, got {values['num_samples']}")
    return from_dict(SampleConfig, values, "sample")


def _labels(text: str | None, count: int, num_classes: int, present: int) -> list[int]:
    """``count`` labels: those of ``text`` ("3,7") or all that the data had, in turn."""
    chosen = list(range(present))
    if text is not None:
        try:
            chosen = [int(part) for part in text.split(",")]
        except ValueError:
            raise UserError(f"--labels: class indices such as 3,7 are needed, got {text!r}") from None
        for label in chosen:
            if not 0 <= label < num_classes:
                raise UserError(f"--labels: allowed are 0 to {num_classes - 1}, got {label}")
    return [chosen[i % len(chosen)] for i in range(count)]


def convert(args: argparse.Namespace) -> int:
    source, target = Path(args.source), Path(args.target)
    metadata: dict[str, Any] = {}
    if source.is_file() and target.exists() and source.samefile(target):
        raise UserError(f"convert: {str(source)!r} and {str(target)!r} are the same file")
    check_writable(target)
    if source.is_file():
        state = read_weights(source)
    else:
        file = checkpoint.WEIGHTS[args.weights]
        opened = open_or_advise(source, [file], "mdt-fast convert {}")
        state = opened.tensors(file)
        metadata = {"model": to_dict(opened.config.model), "step": opened.step, "weights": args.weights}
    write_weights(target, state, **metadata)
    print(f"{len(state)} tensors in {target}")
    return 0
