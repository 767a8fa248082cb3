"""Measure rows per second of the loader and images per second of the encoder, on generated data."""

import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from safetensors.numpy import save_file

from mdt_fast.config import DataConfig
from mdt_fast.data import Loader, open_images
from mdt_fast.data.encode import encode
from mdt_fast.data.latents import INDEX, Encoding, Shard, shard_name, sign
from mdt_fast.files import sha256_of
from measure import rates, spread

if TYPE_CHECKING:
    from training import Request

BATCH = 256  # rows in a loader's batch, as in the published recipes
SHARD = 1024  # rows; two of them, 128 MiB
ENCODED = 64  # images at most, because an autoencoder is slow
LATENT_BATCHES, CHANNELS, SIDE = 16, 4, 32
CLASSES = 1000


def loaders(request: "Request") -> None:
    """Measure rows per second for each source and number of threads, and the ratio to the model's rate."""
    size = request.args.size
    pictures = write_images(request.folder / "images", request.args.images, size)
    encoded = write_latents(request.folder / "latents", size)
    few = max(1, request.args.images // BATCH)
    files = DataConfig(image_size=size, channels=3, flip=True)
    sources = {
        "loader-latents": (replace(files, source=str(encoded)), LATENT_BATCHES),
        "loader-jpeg": (replace(files, source=str(pictures)), few),
        "loader-digits": (DataConfig(flip=True), LATENT_BATCHES),
    }  # fmt: skip
    for op, (config, batches) in sources.items():
        images = open_images(config)
        shape = {"B": BATCH, **dict(zip("CHW", images.shape))}
        # Digits are in memory, so no thread reads them.
        for workers in request.args.workers if not images.in_memory else [1]:
            with_workers = replace(config, workers=workers)
            loader = Loader(
                images, with_workers, batch_size=BATCH, seed=0, pinned=request.device.type == "cuda"
            )
            seconds = [_read(loader, batches) for _ in range(request.repeats + 1)][1:]
            rows_per_s = rates(batches * BATCH, spread(seconds))
            provider = f"{workers} worker" + "s" * (workers > 1)
            request.add(op, provider, "rows_per_s", "rows/s", rows_per_s, shape, mode="read")
            share = rates(batches * BATCH / request.args.consumes, spread(seconds))
            request.add(
                op, provider, "consumption_ratio", "x", share, shape, mode="read",
                note=f"of {request.args.consumes:g} img/s",
            )  # fmt: skip


def _read(loader: Loader, batches: int) -> float:
    start = time.perf_counter()
    for _ in loader.batches(0, batches):
        pass
    return time.perf_counter() - start


def encoding(request: "Request") -> None:
    """Measure images per second of a complete ``mdt-fast encode``: reading, both mirror images, writing."""
    args = request.args
    count = min(args.images, ENCODED)
    pictures = write_images(request.folder / "encode", count, args.size)
    vae = args.vae or str(write_autoencoder(request.folder / "vae"))
    config = DataConfig(
        source=str(pictures), image_size=args.size, channels=3, vae=vae, workers=max(args.workers)
    )
    dtype = "bfloat16" if request.device.type == "cuda" else "float32"
    seconds = []
    for turn in range(request.repeats + 1):
        done = encode(
            config, request.folder / f"encoded-{turn}", device=request.device, vae_dtype=dtype,
            console=Console(quiet=True),
        )  # fmt: skip
        seconds.append(done.seconds)
    request.add(
        "encode", "published" if args.vae else "tiny", "img_per_s", "img/s",
        rates(count, spread(seconds[1:])), {"images": count, "pixels": args.size}, mode="encode",
        dtype=dtype, note=args.vae or "an autoencoder of 4 levels of 8 channels",
    )  # fmt: skip


def write_images(folder: Path, count: int, size: int) -> Path:
    """Write smooth noise as JPEG files, about as large as photographs of the same size."""
    if folder.exists():
        return folder
    folder.mkdir(parents=True)
    noise = np.random.default_rng(0)
    for number in range(count):
        coarse = noise.integers(0, 256, (size // 8 or 1, size // 8 or 1, 3), dtype=np.uint8)
        image = Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC)
        image.save(folder / f"{number % 10}_{number}.jpg", quality=90)
    return folder


def write_latents(folder: Path, pixels: int) -> Path:
    """Write noise in the format of ``mdt-fast encode``."""
    folder.mkdir(parents=True)
    noise, total = np.random.default_rng(0), 2 * SHARD
    encoding = Encoding(
        image_size=pixels, crop="center", mirrored=True, dtype="float32", vae_dtype="float32",
        vae_sha256="0" * 64, scale=0.18215, shift=0.0, channels=CHANNELS, side=SIDE, shard_size=SHARD,
        source_samples=total, source_sha256="0" * 64,
    )  # fmt: skip
    shards = []
    for number in range(encoding.shards):
        path = folder / shard_name(number)
        moments = noise.standard_normal((SHARD, 2 * CHANNELS, SIDE, SIDE), dtype=np.float32)
        labels = noise.integers(0, CLASSES, SHARD)
        mirrored = np.ascontiguousarray(moments[..., ::-1])
        save_file({"moments": moments, "mirrored": mirrored, "labels": labels}, path)
        shards.append(Shard(path.name, SHARD, path.stat().st_size, sha256_of(path)))
    index = {
        "encoding": asdict(encoding), "shards": [asdict(shard) for shard in shards], "dropped": [],
        "classes": [str(number) for number in range(CLASSES)], "autoencoder": "none",
    }  # fmt: skip
    (folder / INDEX).write_text(sign(index))
    return folder


def write_autoencoder(folder: Path) -> Path:
    """Write a seeded AutoencoderKL of factor 8 with few channels."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    AutoencoderKL(
        block_out_channels=(8,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=4,
        latent_channels=CHANNELS,
    ).save_pretrained(folder)
    return folder
