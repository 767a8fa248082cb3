"""Real images as a model's input, and the numbers of kept tokens for the masked pass.

A model reads [B, C, S, S]. With C = k*k (4 for the latent models), the input is made from a grey image of
side S*k, in which each k x k square of pixels becomes the C channels of one position (space to depth). With
any other C, it is made from an RGB image of side S, whose channels are repeated as needed. Values are in
[-1, 1]. The digits are 8x8 pixels and are enlarged bilinearly.
"""

import math
import random
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mdt_fast.config import RATIO_RANGE, DataConfig, ModelConfig
from mdt_fast.data.images import open_images
from mdt_fast.errors import UserError

PERIOD = 16
"""How many kept-token counts are used before they repeat, by default."""


@dataclass(frozen=True)
class Inputs:
    """x_BCSS float32 and labels_B int64 on the CPU, and one line describing them."""

    x_BCSS: Tensor
    labels_B: Tensor
    what: str


def load(source: str, config: ModelConfig, batch: int) -> Inputs:
    """``batch`` images, spread evenly over ``source``: ``digits``, ``synthetic`` or a folder.

    Without scikit-learn, ``digits`` becomes ``synthetic``, and ``what`` says so. Raises ``UserError`` if a
    folder is missing, has no images or contains one that cannot be read.
    """
    if source == "digits":
        try:
            return _digits(config, batch)
        except UserError as error:
            return _synthetic(config, batch, f"synthetic noise ({error})")
    if source == "synthetic":
        return _synthetic(config, batch, "synthetic noise")
    return _folder(source, config, batch)


def len_keeps(config: ModelConfig, number: int) -> list[int] | list[None]:
    """Kept tokens of the masked pass for steps 0, 1, ...; None for a model without a masked pass.

    MDTv2 draws a new ratio in every step, and the time of a step depends on it. Here the ratios are spread
    evenly over the same range (by the van der Corput sequence: 1/2, 1/4, 3/4, 1/8, ...), so that a few steps
    already average the work of many random ones. All providers get the same ratios.
    """
    if config.family == "dit" or config.mask_ratio is None:
        return [None] * number
    width = RATIO_RANGE if config.family == "mdtv2" else 0.0
    tokens = config.grid_size**2
    return [int(tokens * (1 - config.mask_ratio - width * _van_der_corput(i + 1))) for i in range(number)]


def _van_der_corput(index: int) -> float:
    value, half = 0.0, 0.5
    while index:
        value += half * (index & 1)
        index, half = index >> 1, half / 2
    return value


def _digits(config: ModelConfig, batch: int) -> Inputs:
    digits = open_images(DataConfig(source="digits", image_size=8, channels=1))
    return _from_set(digits, config, batch, "scikit-learn's digits")


def _folder(source: str, config: ModelConfig, batch: int) -> Inputs:
    k = _squares(config)
    size, channels = (config.input_size * k, 1) if k else (config.input_size, 3)
    try:
        images = open_images(DataConfig(source=source, image_size=size, channels=channels))
    except UserError as error:
        raise UserError(str(error).replace("data.source", "--data")) from None
    return _from_set(images, config, batch, f"images of {source}")


def _from_set(images: object, config: ModelConfig, batch: int, what: str) -> Inputs:
    number = len(images.labels)
    picked = [i * number // batch if batch <= number else i % number for i in range(batch)]
    pixels = torch.from_numpy(np.stack([images.load(i, random.Random(0)) for i in picked]))
    labels = torch.as_tensor(images.labels[picked]) % config.num_classes
    return Inputs(_fit(pixels, config), labels, f"{what}, {min(batch, number)} of {number}")


def _synthetic(config: ModelConfig, batch: int, what: str) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    side = config.input_size
    x = torch.randn(batch, config.in_channels, side, side, generator=generator).clamp(-1, 1)
    return Inputs(x, torch.randint(config.num_classes, (batch,), generator=generator), what)


def _squares(config: ModelConfig) -> int:
    """k if the model has k*k channels, else 0."""
    k = math.isqrt(config.in_channels)
    return k if k * k == config.in_channels else 0


def _fit(pixels_BCHW: Tensor, config: ModelConfig) -> Tensor:
    k, C, side = _squares(config), config.in_channels, config.input_size
    if k:
        grey = pixels_BCHW.mean(1, keepdim=True)
        return F.pixel_unshuffle(_enlarge(grey, side * k), k).contiguous()
    channels = pixels_BCHW.shape[1]
    return _enlarge(pixels_BCHW, side).repeat(1, -(-C // channels), 1, 1)[:, :C].contiguous()


def _enlarge(x: Tensor, side: int) -> Tensor:
    if x.shape[-1] == side:
        return x
    return F.interpolate(x, size=(side, side), mode="bilinear", align_corners=False)
