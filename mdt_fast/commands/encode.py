"""``mdt-fast encode``."""

import argparse
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from ..config import DataConfig
from ..data import LatentSet
from ..data import encode as engine
from ..data.images import open_source
from ..errors import UserError
from ..processes import Interrupts, Ranks, resolve_device
from .shared import refuse_empty, set_threads


def encode(args: argparse.Namespace) -> int:
    """Encode, or check with ``--verify``; returns the exit code."""
    set_threads(args.threads)
    refuse_empty(args, "out")
    if args.verify:
        return verify(args)
    for name, value in (("SOURCE", args.source), ("--vae", args.vae), ("--image-size", args.image_size)):
        if value is None:
            raise UserError(f"encode: {name} is needed; see mdt-fast encode --help")
    ranks = Ranks.from_environment()
    console = Console(highlight=False, soft_wrap=True)
    config = DataConfig(
        source=args.source,
        image_size=args.image_size,
        channels=3,
        vae=args.vae,
        crop=args.crop,
        on_unreadable=args.on_unreadable,
        workers=args.workers,
    )
    with Interrupts() as interrupts:
        result = engine.encode(
            config,
            Path(args.out),
            device=resolve_device(args.device),
            batch_size=args.batch_size,
            shard_size=args.shard_size,
            dtype=args.dtype,
            vae_dtype=args.vae_dtype,
            mirror=not args.no_mirror,
            console=console if ranks.rank == 0 else None,
            stopped=lambda: interrupts.caught is not None,
        )
    if ranks.rank == 0 or result.wrote_index:
        console.print(describe(result, args.out), markup=False)
    return 128 + interrupts.caught if interrupts.caught is not None and result.index is None else 0


def describe(result: engine.Encoded, out: str) -> str:
    """One line on the outcome."""
    shards = f"{result.shards} of {result.of_shards} shards are complete in {out}"
    if result.stopped and result.index is None:
        return f"stopped; {shards}; resume with the same command"
    speed = f", {result.images / result.seconds:.1f} images/s" if result.images else ""
    share = f"{result.images} images encoded in {result.seconds:.1f} s{speed}"
    if result.index is not None and not result.images:
        return f"nothing to do: {out} is complete, {result.of_shards} shards"
    if result.index is None:
        return f"{share}; {shards}; other processes do the rest; if none is running, use the same command"
    dropped = f"; {result.dropped} could not be read and were skipped" if result.dropped else ""
    return f"{share}; {out} is complete: {result.of_shards} shards{dropped}"


def verify(args: argparse.Namespace) -> int:
    """Check every byte of DIR and, if SOURCE is given, that its images are the ones that were encoded."""
    latents = LatentSet(Path(args.out))
    console = Console(highlight=False, soft_wrap=True)
    with Progress(console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("verifying", total=len(latents.shards))
        latents.verify(lambda done: progress.update(task, completed=done))
    same = ""
    if args.source is not None:
        encoding = latents.encoding
        config = DataConfig(source=args.source, image_size=encoding.image_size, channels=3)
        images = open_source(replace(config, channels=1) if args.source == "digits" else config)
        if engine.source_digest(images) != encoding.source_sha256:
            raise UserError(
                f"SOURCE: {args.source!r} has changed since {args.out!r} was encoded: it had "
                f"{encoding.source_samples} images, now it has {len(images.labels)} (by name, size "
                "and class)"
            )
        same = f", from the images in {args.source}"
    console.print(
        f"{args.out}: {len(latents.labels)} images in {len(latents.shards)} shards, all intact{same}",
        markup=False,
    )
    return 0
