"""Labelled images: a folder of files, or scikit-learn's handwritten digits (no download).

``open_images`` also opens webdatasets (``shards.py``) and encoded sets (``latents.py``).

A set provides the class and the pixels of sample i. Everything random (order, flips, random crops) is decided
by ``loader.py``, so that a resumed run sees the same batches.
"""

import copy
import math
import os
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np
from PIL import Image

from ..config import DataConfig
from ..errors import UserError, not_importable, one_line

SUFFIXES = (".jpg", ".jpeg", ".png", ".gif", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm")
MAX_ASPECT = 100  # long side / short side; upscaling the short side of longer images would fill the memory


class ImageSet(Protocol):
    """The interface of a data set that the loader needs."""

    labels: np.ndarray  # [N] int64
    classes: tuple[str, ...]  # class names by index
    in_memory: bool  # True: no decoding, so no prefetching
    shape: tuple[int, int, int]  # of what ``load`` returns

    def load(self, index: int, rng: random.Random, mirror: bool = False) -> np.ndarray:
        """Sample ``index``, float32: pixels [C, S, S] in [-1, 1], or for an encoded set moments [2C, S, S].

        ``rng`` is used only for random crops; ``mirror``: flip left and right.
        """
        ...


def checked_set(images: ImageSet, config: DataConfig) -> ImageSet:
    """Check that a custom set implements ``ImageSet`` and has images of the configured size; returns it, or
    with ``config.conditional`` False a copy in which all samples have one class. ``UserError`` names what is
    wrong."""
    for name in ("labels", "classes", "in_memory", "shape", "load"):
        if not hasattr(images, name):
            raise UserError(f"images: a {type(images).__name__} has no {name}; see mdt_fast.data.ImageSet")
    labels, classes = np.asarray(images.labels), len(images.classes)
    if labels.ndim != 1 or labels.dtype.kind not in "iu" or not len(labels):
        raise UserError(f"images.labels: got {labels.dtype} {labels.shape}, expected a list of integers")
    if labels.min() < 0 or labels.max() >= classes:
        raise UserError(
            f"images.labels: got {labels.min()} to {labels.max()}, expected 0 to {classes - 1}, as there are "
            f"{classes} classes"
        )
    if not all(isinstance(name, str) for name in images.classes):
        raise UserError(f"images.classes: got {list(images.classes)[:4]!r}, expected names")
    shape, wanted = tuple(images.shape), (config.channels, config.image_size, config.image_size)
    if shape != wanted:
        raise UserError(
            f"images.shape: {list(shape)}, but {list(wanted)} is configured (data.channels, data.image_size)"
        )
    first = images.load(0, random.Random(0), False)
    if not isinstance(first, np.ndarray):
        raise UserError(f"images.load: returned a {type(first).__name__}, expected an array")
    if first.shape != shape or first.dtype != np.float32:
        raise UserError(
            f"images.load: returned {first.dtype} {list(first.shape)}, expected float32 {list(shape)}"
        )
    if config.conditional:
        return images
    images = copy.copy(images)  # the caller's own keeps its classes
    try:
        images.labels, images.classes = np.zeros_like(labels), ("images",)
    except AttributeError as error:  # a property, or frozen
        raise UserError(
            f"images: the labels and classes of a {type(images).__name__} cannot be replaced, as "
            f"data.conditional=False needs: {error}"
        ) from None
    return images


class SourceSet(ImageSet, Protocol):
    """A set of unencoded images, whose samples have names and sizes, so that changes can be detected."""

    def member(self, index: int) -> tuple[str, int]:
        """Name and size in bytes of sample ``index``; size -1 if its file is missing."""
        ...


def open_images(config: DataConfig) -> ImageSet:
    """Open the set that ``config.source`` names: ``digits``, a folder from ``mdt-fast encode``, a folder of
    ``.tar`` shards, or a folder of images. With ``config.conditional`` False all samples have one class.
    Raises ``UserError`` if it cannot be opened.
    """
    images = _open(config)
    if not config.conditional:
        images.labels, images.classes = np.zeros_like(images.labels), ("images",)
    return images


def _open(config: DataConfig) -> ImageSet:
    from .latents import LatentSet, is_encoded

    if config.source != "digits" and config.source and is_encoded(Path(config.source)):
        latents = LatentSet(Path(config.source))
        latents.check(config)
        return latents
    return open_source(config)


def open_source(config: DataConfig) -> SourceSet:
    """The same for unencoded images. ``UserError`` if a folder holds both images and ``.tar`` shards."""
    from .shards import WebDataset, find_shards

    if config.image_size < 1:
        raise UserError(f"data.image_size: got {config.image_size}, expected 1 or more")
    if config.source == "digits":
        return Digits(config)
    if not config.source:
        raise UserError("data.source: no images given; pass --data DIR, or --preset digits")
    root = Path(config.source)
    if shards := find_shards(root):
        if (image := first_image(root)) is not None:
            raise UserError(
                f"data.source: got {config.source!r}, with images ({str(image.relative_to(root))!r}) and "
                f".tar shards ({shards[0].name!r}), expected only one kind"
            )
        return WebDataset(config)
    return ImageFolder(config)


class Digits:
    """scikit-learn's digits: 1,797 grey images of 8x8 pixels, values 0..16 mapped to [-1, 1], labels 0..9."""

    in_memory = True

    def __init__(self, config: DataConfig):
        if config.image_size != 8 or config.channels != 1:
            raise UserError(
                f"data: the digits are 8x8 with 1 channel, got image_size={config.image_size}, "
                f"channels={config.channels}"
            )
        if config.crop != "center":
            raise UserError(f"data.crop: got {config.crop!r}, expected 'center': the digits are used whole")
        try:
            from sklearn.datasets import load_digits
        except ImportError as error:
            raise not_importable("the digits come with scikit-learn", error, "train") from None
        digits = load_digits()
        self.images = (digits.images[:, None] / 8 - 1).astype(np.float32)
        self.labels = digits.target.astype(np.int64)
        self.classes = tuple(str(digit) for digit in range(10))
        self.shape: tuple[int, int, int] = (1, 8, 8)

    def load(self, index: int, rng: random.Random, mirror: bool = False) -> np.ndarray:
        return mirrored(self.images[index]) if mirror else self.images[index]

    def member(self, index: int) -> tuple[str, int]:
        return str(index), self.images[index].size


class ImageFolder:
    """All images under a folder, sorted by path; the layout determines the classes.

    Class folders (``DIR/cat/1.png``): the class is the first folder below DIR. Files directly in DIR: the
    class is the file name up to its first underscore (``ClassID_ImgID.jpg``). Class indices are positions in
    the string-sorted set of names ("10" comes before "2"), as in the official data loader.
    """

    in_memory = False

    def __init__(self, config: DataConfig):
        self.root = Path(config.source)
        self.paths = list_images(self.root)
        within = (path.relative_to(self.root) for path in self.paths)
        names = [class_name(path) if config.conditional else "images" for path in within]
        self.classes = tuple(sorted(set(names)))
        index = {name: i for i, name in enumerate(self.classes)}
        self.labels = np.array([index[name] for name in names], dtype=np.int64)
        self.size, self.channels, self.crop = config.image_size, config.channels, config.crop
        self.shape: tuple[int, int, int] = (self.channels, self.size, self.size)

    def load(self, index: int, rng: random.Random, mirror: bool = False) -> np.ndarray:
        path = self.paths[index]
        pixels = to_pixels(read_image(path, self.channels), str(path), self.size, self.crop, rng)
        return mirrored(pixels) if mirror else pixels

    def member(self, index: int) -> tuple[str, int]:
        path = self.paths[index]
        try:
            size = path.stat().st_size
        except OSError:  # a broken link is an error only when it is read
            size = -1
        return path.relative_to(self.root).as_posix(), size


def list_images(root: Path, what: str = "data.source") -> list[Path]:
    """Every image below ``root`` by its suffix (``SUFFIXES``, any case), sorted; hidden ones are skipped.

    Links are followed. ``UserError``, which begins with ``what``, names an unreadable folder or a broken link
    (unless it has an image suffix), because it may stand for a whole class.
    """
    try:
        if not root.exists():
            raise UserError(f"{what}: no folder {str(root)!r}")
        if not root.is_dir():
            raise UserError(f"{what}: {str(root)!r} is a file; a folder of images is needed")
        paths = sorted(_walk(root, frozenset()))
    except OSError as error:
        raise UserError(f"{what}: cannot read {str(error.filename)!r}: {error.strerror}") from None
    if not paths:
        raise UserError(f"{what}: no images ({', '.join(s[1:] for s in SUFFIXES)}) in {str(root)!r}")
    return paths


def first_image(root: Path) -> Path | None:
    """An image of a class of :class:`ImageFolder`, or None. What cannot be read does not count, nor do the
    pictures of a run."""
    images = _walk(root, frozenset(), strict=False)
    return next((path for path in images if path.parent != root or "_" in path.name), None)


def _walk(folder: Path, above: frozenset[tuple[int, int]], strict: bool = True) -> Iterator[Path]:
    """The images below ``folder``; ``above`` identifies its parent folders, so that link loops end. Unless
    ``strict``, unreadable folders and broken links are left out, and runs."""
    if not strict and (not os.access(folder, os.R_OK | os.X_OK) or (folder / "metrics.jsonl").exists()):
        return
    status = folder.stat()
    identity = status.st_dev, status.st_ino
    # Only loops are cut: two links to the same folder are two classes.
    if identity in above:
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            path = folder / entry.name
            if entry.is_dir():
                yield from _walk(path, above | {identity}, strict)
            elif path.suffix.lower() in SUFFIXES:
                # A broken link is listed: the loader decides whether a bad image stops the run.
                if entry.is_file() or not path.exists():
                    yield path
            elif strict and entry.is_symlink():
                entry.stat()  # raises if the link is broken


def class_name(relative: Path) -> str:
    """The class of a file: its top folder below the root, or its name up to the first underscore."""
    if len(relative.parts) > 1:
        return relative.parts[0]
    name, underscore, _ = relative.name.partition("_")
    if not underscore:
        raise UserError(
            f"data.source: cannot tell the class of {str(relative)!r}; use class folders "
            "(CLASS/image.png) or names like ClassID_ImgID.png; for images without classes use train "
            "--unconditional, or put them all in one class folder"
        )
    return name


def mirrored(pixels: np.ndarray) -> np.ndarray:
    """``pixels`` flipped left to right."""
    return np.ascontiguousarray(pixels[..., ::-1])


def to_pixels(image: Image.Image, name: str, size: int, crop: str, rng: random.Random) -> np.ndarray:
    """``image``, cropped as ``crop`` says: [C, S, S] float32 in [-1, 1]. ``UserError`` names the image."""
    try:
        cropped = center_crop(image, size) if crop == "center" else random_crop(image, size, rng)
    except MemoryError:
        raise UserError(
            f"cannot scale image {name!r} of {image.width}x{image.height} pixels to "
            f"data.image_size={size}: out of memory"
        ) from None
    pixels_HWC = cropped.reshape(size, size, -1)
    return np.ascontiguousarray(pixels_HWC.transpose(2, 0, 1), dtype=np.float32) / 127.5 - 1


def read_image(file: Path | BinaryIO, channels: int, name: str | None = None) -> Image.Image:
    """Read the first frame of a file as 8-bit RGB (3 channels) or grey (1). ``UserError`` names a bad file.

    ``name``: its name in messages, if not its path.
    """
    try:
        with Image.open(file) as image:
            if max(image.size) > MAX_ASPECT * min(image.size):
                raise ValueError(
                    f"{image.width}x{image.height} pixels; the long side may be at most {MAX_ASPECT} times "
                    "the short side"
                )
            return _to_8_bits(image).convert("RGB" if channels == 3 else "L")
    except Exception as error:  # Pillow's decoders can raise almost anything, even MemoryError
        reason = one_line(error)
        raise UserError(f"cannot read image {name or str(file)!r}: {reason}") from None


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Scale 16-bit grey to 8 bits; Pillow's ``convert`` would clip it to white."""
    if image.mode == "F":
        raise ValueError("floating-point pixels; 8-bit or 16-bit pixels are needed")
    if not image.mode.startswith("I"):
        return image
    pixels = np.asarray(image).astype(np.int64)
    if pixels.min() < 0 or pixels.max() > 65535:
        raise ValueError(f"pixel values {pixels.min()} to {pixels.max()}; 16-bit pixels are 0 to 65535")
    return Image.fromarray(((pixels + 128) // 257).astype(np.uint8))


def center_crop(image: Image.Image, size: int) -> np.ndarray:
    """The centre square after scaling the short side to ``size`` (S): uint8 [S, S] or [S, S, 3].

    Halved with a box filter while the short side is at least twice ``size``, then bicubic, as the official
    data loader does. Smaller images are enlarged.
    """
    pixels = _short_side_to(image, size)
    top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    return pixels[top : top + size, left : left + size]


def center_crop_mask(mask: Image.Image, size: int) -> np.ndarray:
    """Which pixels of :func:`center_crop` contain any white (128 or more) of the ``mask``: bool [S, S]."""
    white = Image.fromarray((np.asarray(mask) >= 128).astype(np.float32))
    part = _short_side_to(white, size, Image.Resampling.BOX)
    top, left = (part.shape[0] - size) // 2, (part.shape[1] - size) // 2
    return part[top : top + size, left : left + size] > 1e-6


def random_crop(image: Image.Image, size: int, rng: random.Random) -> np.ndarray:
    """A random square of 80 to 100% of the short side, scaled to ``size`` (S): uint8 [S, S] or [S, S, 3]."""
    short_side = rng.randrange(size, math.ceil(size / 0.8) + 1)
    pixels = _short_side_to(image, short_side)
    top = rng.randrange(pixels.shape[0] - size + 1)
    left = rng.randrange(pixels.shape[1] - size + 1)
    return pixels[top : top + size, left : left + size]


def _short_side_to(
    image: Image.Image, short_side: int, last: Image.Resampling = Image.Resampling.BICUBIC
) -> np.ndarray:
    while min(image.size) >= 2 * short_side:
        image = image.resize((image.width // 2, image.height // 2), resample=Image.Resampling.BOX)
    scale = short_side / min(image.size)
    new_size = round(image.width * scale), round(image.height * scale)
    return np.asarray(image.resize(new_size, resample=last))


def check_classes(classes: Sequence[str], num_classes: int) -> None:
    """``UserError`` if the data has more classes than the model has label rows."""
    if len(classes) > num_classes:
        raise UserError(
            f"model.num_classes: the data has {len(classes)} classes, but the model only {num_classes}; "
            f"use --set model.num_classes={len(classes)}"
        )
