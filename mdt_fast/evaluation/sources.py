"""Sets of images to evaluate, from a ``.npz`` or a folder, in uint8 batches."""

import os
import random
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

from ..config import DataConfig
from ..data.ahead import read_ahead
from ..data.images import Digits, center_crop, list_images, read_image
from ..errors import UserError
from .npz import Npz

DIGITS = "digits"
DECODERS = min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
"""Threads that decode the images of a folder ahead of the network; ``--threads`` is for the network."""
GREY = ("1", "L", "LA", "I", "I;16", "I;16B", "I;16L")


class Images(Protocol):
    """``count`` images of the same ``shape`` (H, W, C)."""

    name: str
    count: int
    shape: tuple[int, int, int]

    def batches(self, size: int) -> Iterator[np.ndarray]:
        """All images in order: uint8 [b, H, W, C], where b is ``size`` except in the last batch."""
        ...

    def label(self, index: int) -> str:
        """The name of image ``index`` in messages."""
        ...


class NpzImages:
    """``arr_0`` uint8 [N, H, W, C], C 1 or 3, as in ADM's sample and reference files."""

    def __init__(self, npz: Npz):
        self.npz, self.name = npz, str(npz.path)
        header = npz.headers["arr_0"]
        if (
            header.dtype != np.uint8
            or len(header.shape) != 4
            or header.shape[3] not in (1, 3)
            or header.fortran
        ):
            order = " in Fortran order" if header.fortran else ""
            raise UserError(
                f"{npz.what}: arr_0 in {self.name!r} is {header.dtype} {list(header.shape)}{order}; images "
                "are uint8 [N, H, W, C] with C 1 or 3"
            )
        self.count = header.shape[0]
        self.shape: tuple[int, int, int] = header.shape[1:]

    def batches(self, size: int) -> Iterator[np.ndarray]:
        return self.npz.parts("arr_0", size)

    def label(self, index: int) -> str:
        return f"arr_0[{index}]"


class FolderImages:
    """Every image below a folder (:func:`list_images`), in a fixed shuffled order: sorted by path they would
    come class by class, but each part of an Inception Score must contain all classes.

    ``image_size``: scale the short side to it and crop the centre square, as in training; without it, all
    images must have the size of the first one. They are grey if the first one is.
    """

    def __init__(self, folder: Path, what: str, image_size: int | None = None):
        self.paths, self.name, self.what, self.image_size = (
            list_images(folder, what),
            str(folder),
            what,
            image_size,
        )
        self.count = len(self.paths)
        self.order = random.Random(0).sample(range(self.count), self.count)
        try:
            with Image.open(self.paths[0]) as first:
                self.channels = 1 if first.mode in GREY else 3
        except Exception as error:  # Pillow's decoders raise all kinds of errors
            raise UserError(f"{what}: cannot read image {str(self.paths[0])!r}: {error}") from None
        self.shape: tuple[int, int, int] = self._load(0).shape

    def batches(self, size: int) -> Iterator[np.ndarray]:
        def begin(start: int, pool: Executor) -> Callable[[], np.ndarray]:
            parts = [pool.submit(self._checked, index) for index in self.order[start : start + size]]
            return lambda: np.stack([part.result() for part in parts])

        return read_ahead(range(0, self.count, size), begin, DECODERS)

    def label(self, index: int) -> str:
        return str(self.paths[self.order[index]])

    def _checked(self, index: int) -> np.ndarray:
        pixels = self._load(index)
        if pixels.shape != self.shape:
            raise UserError(
                f"{self.what}: {str(self.paths[index])!r} is {_size(pixels.shape)}, {self.paths[0].name!r} "
                f"is {_size(self.shape)}; one size is needed (--image-size N crops them)"
            )
        return pixels

    def _load(self, index: int) -> np.ndarray:
        path = self.paths[index]
        image = read_image(path, self.channels)
        if self.channels == 1:
            with Image.open(path) as opened:
                if opened.mode not in GREY:
                    raise UserError(f"{self.what}: {str(path)!r} has colours, {self.paths[0].name!r} is grey")
        pixels = np.asarray(image) if self.image_size is None else center_crop(image, self.image_size)
        return pixels.reshape(*pixels.shape[:2], self.channels)


class DigitImages:
    """scikit-learn's digits, 8x8 grey, as uint8 like the samples of a model trained on them."""

    name = DIGITS

    def __init__(self) -> None:
        pixels_NCHW = (Digits(DataConfig()).images + 1) * 127.5
        self.pixels_NHWC = pixels_NCHW.transpose(0, 2, 3, 1).astype(np.uint8)
        self.count = len(self.pixels_NHWC)
        self.shape: tuple[int, int, int] = self.pixels_NHWC.shape[1:]

    def batches(self, size: int) -> Iterator[np.ndarray]:
        return (self.pixels_NHWC[start : start + size] for start in range(0, self.count, size))

    def label(self, index: int) -> str:
        return f"digit {index}"


def check_same_size(samples: Images, reference: Images) -> None:
    """Raise ``UserError`` unless both have the same height, width and number of channels."""
    if samples.shape != reference.shape:
        raise UserError(
            f"reference: the images in {reference.name!r} are {_size(reference.shape)}, those in "
            f"{samples.name!r} are {_size(samples.shape)}; they must be of one size"
        )


def _size(shape: tuple[int, ...]) -> str:
    colours = "" if len(shape) < 3 else {1: " grey", 3: " RGB"}[shape[2]]
    return f"{shape[1]}x{shape[0]}{colours}"
