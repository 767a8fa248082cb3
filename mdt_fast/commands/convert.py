"""``mdt-fast convert``."""

import argparse
import os
from pathlib import Path
from typing import Any

from ..config import to_dict
from ..errors import UserError
from ..files import folder_aside, is_leftover
from ..models import Transformer
from ..models.convert import SUFFIXES, full_disk_named, read_weights, write_weights
from ..models.hub import saved_in
from ..sampling import check_name, check_writable
from ..training import checkpoint
from ..training.from_official import make_run, read_optimizer, refuse_used
from ..training.from_weights import what_is_said
from ..training.official_files import find_files, write_official
from ..training.run import open_or_advise
from ..training.states import whole_state
from .official_config import RECIPE, official_config


def convert(args: argparse.Namespace) -> int:
    """Convert to official files with ``--official``, or to a pipeline's folder with ``--diffusers``. From a
    source that is not a run, to a target that is not a weights file: make a run. Otherwise write one weights
    file."""
    source, target = Path(args.source), Path(args.target)
    check_name(target, "convert")
    if args.diffusers:
        return _pipeline(args, source, target)
    recipe = [name for name in RECIPE if getattr(args, name)]
    elsewhere = source.exists() and not checkpoint.is_ours(source)
    becomes_run = elsewhere and target.suffix not in SUFFIXES and (recipe or not target.suffix)
    if becomes_run and not args.official:
        return _run(args, source, target)
    if recipe and not source.exists():
        raise UserError(f"convert: {str(source)!r} does not exist")
    if recipe:
        way = "" if elsewhere else "; mdt-fast convert RUN FILE.safetensors writes a run's weights to a file"
        raise UserError(
            f"--{recipe[0].replace('_', '-')}: only for making a run from official files or weights; "
            f"converting {str(source)!r} to {str(target)!r} does not make one{way}"
        )
    return _official_files(args, source, target) if args.official else _weights_file(args, source, target)


def _weights_file(args: argparse.Namespace, source: Path, target: Path) -> int:
    metadata: dict[str, Any] = {}
    if source.is_file() and target.exists() and source.samefile(target):
        raise UserError(f"convert: {str(source)!r} and {str(target)!r} are the same file")
    check_writable(target)
    if source.is_file():
        check_no_part(args, source)
        state = read_weights(source)
        if source.suffix == ".safetensors":
            metadata = what_is_said(source)
    elif (subfolder := saved_in(source)) is not None:
        check_no_part(args, source)
        model = Transformer.from_pretrained(source, subfolder=subfolder)
        state, metadata = model.state_dict(), {"model": to_dict(model.config)}
    else:
        opened = open_or_advise(source, [args.weights], "mdt-fast convert {}")
        state = whole_state(opened, args.weights)
        if (note := opened.note(args.weights, "convert it with --weights model")) is not None:
            print(note)
        metadata = {
            "model": to_dict(opened.config.model), "diffusion": to_dict(opened.config.diffusion),
            "sample": to_dict(opened.config.sample), "classes": list(opened.classes),
            "latents": opened.state.get("latents"), "step": opened.step, "weights": args.weights,
        }  # fmt: skip
    write_weights(target, state, **metadata)
    print(f"{len(state)} tensors in {target}")
    return 0


def check_no_part(args: argparse.Namespace, source: Path) -> None:
    if args.weights != checkpoint.EMA:
        raise UserError(f"--weights: {args.weights!r} is for runs; {str(source)!r} has one set of weights")


def _official_files(args: argparse.Namespace, source: Path, target: Path) -> int:
    if args.weights != checkpoint.EMA:
        raise UserError("--weights: official files hold both the EMA and the last step's; leave it out")
    check_writable(target, folder=True)
    opened = open_or_advise(source, checkpoint.PARTS, "mdt-fast convert {}")
    files = write_official(opened, target)
    for note in files.notes:
        print(note)
    names = [files.model, *files.averages.values(), files.optimizer]
    print(
        f"{opened.path} ({opened.step} updates) in {target}: {', '.join(path.name for path in names if path)}"
    )
    print(f"resume the official script with --resume_checkpoint {files.model}")
    return 0


PIPELINE = "pipeline"
"""Name of the temporary folder used when the pipeline is written into an existing folder."""


def _pipeline(args: argparse.Namespace, source: Path, target: Path) -> int:
    if args.official:
        raise UserError("--diffusers: makes a pipeline's folder, --official official files; pass only one")
    for name in RECIPE:
        if name != "vae" and getattr(args, name):
            raise UserError(f"--{name.replace('_', '-')}: does not apply to a pipeline; leave it out")
    check_writable(target, folder=True)
    if target.is_dir() and not all(is_leftover(path, [PIPELINE]) for path in target.iterdir()):
        raise UserError(f"cannot write {str(target)!r}: it already holds files; choose another folder")
    from ..pipelines import MDTPipeline  # diffusers takes seconds to import

    pipeline = MDTPipeline.from_run(source, weights=args.weights, vae=args.vae)
    there = target.is_dir()
    target.absolute().parent.mkdir(parents=True, exist_ok=True)
    with folder_aside(target / PIPELINE if there else target.absolute()) as folder:
        with full_disk_named(target):
            pipeline.save_pretrained(folder)
        if there:
            for path in sorted(folder.iterdir(), key=lambda path: path.name == "model_index.json"):  # last
                os.replace(path, target / path.name)
        else:
            os.replace(folder, target)
    parts = ", ".join(sorted(path.name for path in target.iterdir()))
    print(f"{parts} in {target}; load it with MDTPipeline.from_pretrained({str(target)!r})")
    return 0


def _run(args: argparse.Namespace, source: Path, target: Path) -> int:
    if args.weights != checkpoint.EMA:
        raise UserError("--weights: selects weights of a source run; making a run uses all of the source's")
    check_writable(target, folder=True)
    refuse_used(target)
    files = find_files(source)
    weights = read_weights(files.model, mmap=True)
    packed = None if files.optimizer is None else read_optimizer(files.optimizer)
    config, notes = official_config(args, files, weights, packed)
    notes = [*files.notes, *notes, *make_run(target, config, files, weights, packed)]
    for note in notes:
        print(note)
    print(f"{files.model} is step {files.step} of {target}; resume with")
    print(f"  mdt-fast train --out {target} --resume auto")
    return 0
