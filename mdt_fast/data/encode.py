"""Encodes images to latents once: the engine of ``mdt-fast encode``.

The source's samples are split into shards by position, and rank i % world makes shard i. A shard and its JSON
are written under temporary names and renamed, so a killed run leaves only complete shards, and the next run
makes the missing ones. Ranks do not communicate: any rank that finds all shards complete writes the index,
whose content is the same for all ranks.
"""

import hashlib
import random
import time
from collections.abc import Callable
from concurrent.futures import Executor
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from rich.console import Console

from ..config import DataConfig
from ..errors import UserError
from ..files import resolved
from ..processes import Ranks
from .ahead import read_ahead
from .autoencoder import Autoencoder
from .encode_folder import Folder
from .images import SourceSet, open_source
from .latents import DTYPES, Encoding, is_encoded
from .progress import ImageProgress


@dataclass(frozen=True)
class Encoded:
    """The outcome: this process encoded ``images`` in ``seconds``; ``shards`` are complete in total.

    ``index``: that of the finished folder, or None while shards are missing; ``wrote_index``: whether this
    process wrote it.
    """

    images: int
    seconds: float
    shards: int
    of_shards: int
    dropped: int
    stopped: bool
    index: Path | None
    wrote_index: bool


def encode(
    config: DataConfig,
    out: Path,
    *,
    device: torch.device | str = "cpu",
    batch_size: int = 64,
    shard_size: int = 4096,
    dtype: Literal["float32", "float16"] = "float32",
    vae_dtype: Literal["float32", "bfloat16"] = "float32",
    mirror: bool = True,
    console: Console | None = None,
    stopped: Callable[[], bool] = lambda: False,
) -> Encoded:
    """Encode this rank's share of ``config.source`` with ``config.vae`` into the folder ``out``.

    Of ``config`` it uses source, image_size, crop, vae, on_unreadable (skip: leave out unreadable images) and
    workers. ``dtype``: of the stored moments; ``vae_dtype``: compute dtype of the autoencoder (in float32,
    CUDA convolutions use TF32 unless ``torch.backends.cudnn.allow_tf32`` is off). ``stopped`` is checked
    before each batch: once true, the unfinished shard is dropped. At most one shard is in memory. Raises
    ``UserError`` for invalid settings, an unreadable image, a source or settings that differ from those
    ``out`` was begun with, and a full disk; complete shards stay.
    """
    for name, number in (("--batch-size", batch_size), ("--shard-size", shard_size)):
        if number < 1:
            raise UserError(f"{name}: got {number}, expected 1 or more")
    if config.workers < 1:
        raise UserError(f"workers: got {config.workers}, expected 1 or more")
    if config.vae is None:
        raise UserError("vae: the folder or hub name of an AutoencoderKL is needed")
    ranks = Ranks.from_environment()
    check_source(config, out)
    vae = Autoencoder.load(config.vae, device, getattr(torch, vae_dtype))
    if config.image_size < 1 or config.image_size % vae.factor:
        raise UserError(
            f"image_size: got {config.image_size}, expected a multiple of {vae.factor}, the pixels per "
            f"latent of {vae.name!r}"
        )
    if vae.image_channels not in (1, 3):
        raise UserError(f"vae: {vae.name!r} takes images with {vae.image_channels} channels, not 1 or 3")
    grey = config.source == "digits"
    images = open_source(replace(config, channels=1 if grey or vae.image_channels == 1 else 3))
    encoding = Encoding(
        image_size=config.image_size,
        crop="center",
        mirrored=mirror,
        dtype=dtype,
        vae_dtype=vae_dtype,
        vae_sha256=vae.fingerprint,
        scale=vae.scale,
        shift=vae.shift,
        channels=vae.latent_channels,
        side=config.image_size // vae.factor,
        shard_size=shard_size,
        source_samples=len(images.labels),
        source_sha256=source_digest(images),
    )
    folder = Folder(out, encoding, vae.name, images.classes)
    folder.prepare(ranks)
    mine = range(encoding.shards)[ranks.rank :: ranks.world]
    todo = {shard: encoding.span(shard) for shard in mine if folder.record(shard) is None}
    batches = {shard: _batches(span, batch_size) for shard, span in todo.items()}

    def begin(batch: range, pool: Executor) -> Callable[[], list[np.ndarray | UserError]]:
        samples = [pool.submit(_read, images, index) for index in batch]
        return lambda: [sample.result() for sample in samples]

    read = read_ahead(chain.from_iterable(batches.values()), begin, config.workers)
    total, done, began = sum(map(len, todo.values())), 0, time.perf_counter()
    with closing(read), ImageProgress(total, ranks.world, console) as bar:
        for shard, span in todo.items():
            rows = Rows(encoding, len(span))
            for batch in batches[shard]:
                if stopped():
                    break
                rows.add(vae, images, batch, next(read), skip=config.on_unreadable == "skip")
                bar.update(done := done + len(batch))
            if rows.seen < len(span):
                break
            folder.write(shard, rows.tensors(), rows.dropped)
    index, wrote = folder.finish()
    records = [record for shard in range(encoding.shards) if (record := folder.record(shard)) is not None]
    return Encoded(
        images=done,
        seconds=time.perf_counter() - began,
        shards=len(records),
        of_shards=encoding.shards,
        dropped=sum(len(record["dropped"]) for record in records),
        stopped=stopped(),
        index=index,
        wrote_index=wrote,
    )


def check_source(config: DataConfig, out: Path) -> None:
    """``UserError`` for a source that cannot be encoded, before any slow work."""
    source = Path(config.source)
    if config.crop != "center":
        raise UserError(f"crop: encoding needs center crops, got {config.crop!r}")
    if config.source != "digits" and config.source:
        if resolved(source) == resolved(out):
            raise UserError(f"out: {str(out)!r} is the source itself; choose another folder")
        if is_encoded(source):
            raise UserError(f"SOURCE: {config.source!r} is already encoded; images are needed")


def source_digest(images: SourceSet) -> str:
    """SHA-256 over the classes, and the name, size and label of every sample in order."""
    digest = hashlib.sha256(repr(images.classes).encode(errors="surrogateescape"))
    for index, label in enumerate(images.labels.tolist()):
        name, size = images.member(index)
        digest.update(f"{name}\0{size}\0{label}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


class Rows:
    """Collects the moments of one shard, the only large data here."""

    def __init__(self, encoding: Encoding, capacity: int):
        shape = (capacity, 2 * encoding.channels, encoding.side, encoding.side)
        names = ["moments", "mirrored"] if encoding.mirrored else ["moments"]
        try:
            self.moments = {name: np.empty(shape, DTYPES[encoding.dtype][1]) for name in names}
        except (MemoryError, ValueError):  # ValueError: more bytes than a number of 64 bits can count
            raise UserError(
                f"--shard-size: got {encoding.shard_size}, expected fewer: the moments of {capacity} images "
                f"of {encoding.image_size}x{encoding.image_size} pixels do not fit into memory"
            ) from None
        self.labels: list[int] = []
        self.dropped: list[dict[str, Any]] = []

    def add(
        self,
        vae: Autoencoder,
        images: SourceSet,
        batch: range,
        loaded: list[np.ndarray | UserError],
        *,
        skip: bool,
    ) -> None:
        """Encode one batch of ``images``; ``loaded``: their pixels, or the errors of unreadable ones."""
        kept, pixels = [], []
        for position, image in zip(batch, loaded):
            if isinstance(image, np.ndarray):
                kept.append(position)
                pixels.append(image)
            elif skip:
                self.dropped.append({"position": position, "name": images.member(position)[0]})
            else:
                raise UserError(f"{image}; --on-unreadable skip leaves out such images") from image
        if not kept:
            return
        x = torch.from_numpy(np.stack(pixels)).expand(-1, vae.image_channels, -1, -1)  # grey to RGB
        first, last = len(self.labels), len(self.labels) + len(kept)
        for name, values in self.moments.items():
            moments = vae.moments(x.flip(-1) if name == "mirrored" else x).cpu().numpy()
            with np.errstate(over="ignore"):  # overflow to infinity is refused below
                values[first:last] = moments
            finite = np.isfinite(values[first:last]).all(axis=(1, 2, 3))
            if not finite.all():
                bad = images.member(kept[int(np.argmin(finite))])[0]
                raise UserError(f"vae: the moments of {bad!r} are not finite in {values.dtype}")
        self.labels += images.labels[kept].tolist()

    @property
    def seen(self) -> int:
        """Number of images encoded or dropped."""
        return len(self.labels) + len(self.dropped)

    def tensors(self) -> dict[str, torch.Tensor]:
        count = len(self.labels)
        moments = {name: torch.from_numpy(values[:count]) for name, values in self.moments.items()}
        return {**moments, "labels": torch.tensor(self.labels, dtype=torch.int64)}


def _batches(span: range, batch_size: int) -> list[range]:
    return [span[start : start + batch_size] for start in range(0, len(span), batch_size)]


def _read(images: SourceSet, index: int) -> np.ndarray | UserError:
    """The pixels of one sample, or the error if it is unreadable."""
    try:
        return images.load(index, random.Random(0))
    except UserError as error:
        return error
