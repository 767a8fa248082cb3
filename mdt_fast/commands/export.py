"""``mdt-fast export``."""

import argparse
from dataclasses import replace
from pathlib import Path

from ..data import described_stage
from ..errors import UserError
from ..processes import resolve_device
from ..sampling import check_name, check_writable, export_step
from ..sampling.export import MOST_IMAGES
from ..sampling.schedulers import SOLVERS
from ..training.checkpoint import EMA
from ..training.from_weights import open_for_drawing
from ..training.states import model_of
from .shared import set_threads


def export(args: argparse.Namespace) -> int:
    set_threads(args.threads)
    target = Path(args.target)
    if target.suffix != ".pt2":
        raise UserError(f"export: got {args.target!r}, expected a name that ends in .pt2")
    check_writable(target)
    check_name(target, "export")
    batch = _batch(args.batch)
    opened = open_for_drawing(Path(args.run), EMA, "mdt-fast export {}")
    if (note := opened.note(EMA, "export a file of mdt-fast convert --weights model")) is not None:
        print(note)
    device = resolve_device(args.device)
    stage = described_stage(opened.state.get("latents"), opened.config.data)
    config = replace(opened.config.sample, dtype="float32")
    if config.sampler in SOLVERS:
        print(
            f"the run samples with {config.sampler} from diffusers, which is not in the file: the file's "
            f"default is {config.steps} steps of ddim; run_exported takes others"
        )
        config = replace(config, sampler="ddim")
    if not opened.config.data.conditional:
        config = replace(config, cfg_scale=1.0)
    model = model_of(opened, EMA).to(device)
    export_step(
        model, opened.config.diffusion, target, config, clip_denoised=stage.clip, batch=batch,
        aoti=args.aoti, classes=opened.classes,
    )  # fmt: skip
    kind = f"an AOTInductor package for this machine's {device.type}" if args.aoti else "an exported program"
    print(f"one sampling step of {opened.path} in {target}, {kind}; {target.stat().st_size:,} bytes")
    return 0


def _batch(text: str) -> int | None:
    if text == "dynamic":
        return None
    if not text.isdecimal() or len(text) > 9 or not 1 <= int(text) <= MOST_IMAGES:
        raise UserError(f"--batch: got {text[:40]!r}, expected dynamic or a number from 1 to {MOST_IMAGES}")
    return int(text)
