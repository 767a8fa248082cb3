"""The image and the mask of ``mdt-fast sample --image X --mask M``."""

import argparse
import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..data import FirstStage
from ..data.images import center_crop, center_crop_mask, read_image
from ..errors import UserError, one_line
from ..files import DAMAGED
from ..sampling.folder import DIGEST

GREY = 127


@dataclass(frozen=True, eq=False)
class Known:
    """The image in the model's space, [C, S, S], and where it is ``unknown``, bool [S, S]; if there are
    pixels, they too, uint8 [H, W, 1 or 3], and where they are unknown, bool [H, W, 1]."""

    image: Tensor
    unknown: Tensor
    pixels: np.ndarray | None
    unknown_pixels: np.ndarray

    def paste(self, images_NHWC: np.ndarray) -> np.ndarray:
        """Paste the known pixels over decoded ones."""
        if self.pixels is None:
            return images_NHWC
        return np.where(self.unknown_pixels, images_NHWC, self.pixels)

    def shown(self) -> list[np.ndarray]:
        """For a grid: the image, and its known part."""
        if self.pixels is None:
            return []
        return [self.pixels, np.where(self.unknown_pixels, np.uint8(GREY), self.pixels)]


def check_known(args: argparse.Namespace) -> None:
    """``UserError`` for an option given without another that it needs."""
    for name, other in (("image", "mask"), ("mask", "image"), ("hide", "image"), ("resample", "image")):
        if getattr(args, name) is not None and getattr(args, other) is None:
            raise UserError(f"--{name}: also needs --{other}")


def read_known(args: argparse.Namespace, stage: FirstStage, channels: int) -> Known:
    """Read ``--image`` and ``--mask``, both scaled and cropped as in training.

    ``channels``: of the pixels. A latent is unknown if any of its pixels is. ``UserError`` if they do not
    match each other or the model.
    """
    mask = _picture("--mask", args.mask, 1)
    if Path(args.image).suffix == ".npy":
        image = _array(args.image, stage)
        size, known = (stage.size, stage.size), None
    else:
        picture = _picture("--image", args.image, channels)
        size, side = picture.size, stage.size * stage.factor
        known = center_crop(picture, side).reshape(side, side, channels)
    if mask.size != size:
        raise UserError(
            f"--mask: {mask.width}x{mask.height} pixels, but --image has {size[0]}x{size[1]}; they must match"
        )
    unknown = center_crop_mask(mask, stage.size if known is None else len(known))
    if not unknown.any():
        raise UserError("--mask: has no white, so there is nothing to fill in; black is kept")
    if known is None:
        return Known(image, torch.from_numpy(unknown), None, unknown[:, :, None])
    pixels = torch.from_numpy(known.astype(np.float32).transpose(2, 0, 1)) / 127.5 - 1
    (image,) = stage.encode(pixels[None])
    cells = unknown.reshape(stage.size, stage.factor, stage.size, stage.factor).any(axis=(1, 3))
    return Known(image, torch.from_numpy(cells), known, unknown[:, :, None])


def digest_of(file: str) -> dict[str, str]:
    return {DIGEST: hashlib.sha256(Path(file).read_bytes()).hexdigest()[:16]}


def _picture(option: str, file: str, channels: int) -> Image.Image:
    try:
        return read_image(Path(file), channels)
    except UserError as error:
        raise UserError(f"{option}: {error}") from None


def _array(file: str, stage: FirstStage) -> Tensor:
    shape = [stage.channels, stage.size, stage.size]
    try:
        array = np.load(file, allow_pickle=False)
    except DAMAGED as error:
        raise UserError(f"--image: cannot read {file!r}: {one_line(error)}") from None
    if not isinstance(array, np.ndarray) or list(array.shape) != shape or array.dtype.kind != "f":
        got = f"{array.dtype} {list(array.shape)}" if isinstance(array, np.ndarray) else "an archive"
        raise UserError(f"--image: a .npy needs floats {shape}, got {got}")
    with np.errstate(over="ignore"):  # overflow to infinity is refused later with other non-finite values
        return torch.from_numpy(array.astype(np.float32))
