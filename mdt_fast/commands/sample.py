"""``mdt-fast sample``."""

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import Progress

from ..config import SampleConfig, from_dict, to_dict
from ..data import described_stage
from ..errors import UserError
from ..models import zoo
from ..models.convert import load_weights
from ..sampling import (
    check_sampling,
    check_writable,
    grid,
    sampling_diffusion,
    save_npz,
    save_picture,
    save_pngs,
    to_uint8,
)
from ..sampling import sample as draw
from ..training.checkpoint import EMA
from ..training.run import open_or_advise, resolve_device
from ..training.states import whole_state
from .shared import refuse_empty, set_threads


def sample(args: argparse.Namespace) -> int:
    set_threads(args.threads)
    refuse_empty(args, "npz", "grid", "png")
    opened = open_or_advise(Path(args.run), [EMA], "mdt-fast sample {}")
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
    load_weights(model, whole_state(opened, EMA), str(opened.path))
    device = resolve_device(args.device)
    model.to(device)
    data = opened.config.data if args.vae is None else replace(opened.config.data, vae=args.vae)
    stage = described_stage(opened.state.get("latents"), data, device)

    console = Console(highlight=False, soft_wrap=True)
    steps = opened.config.diffusion.diffusion_steps
    with Progress(console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("sampling", total=len(labels))
        drawn = draw(
            model, diffusion, labels, config, diffusion_steps=steps, clip_denoised=stage.clip,
            on_batch=lambda done: progress.update(task, completed=done),
        )  # fmt: skip
        images = np.concatenate([to_uint8(stage.decode(part)) for part in drawn.split(config.batch_size)])
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
