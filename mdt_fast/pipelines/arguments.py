"""Checks of a pipeline's arguments; each ``UserError`` names the argument.

n images, C channels and side S.
"""

import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ..config import ModelConfig
from ..errors import UserError, nearest
from ..kernels.checks import is_integer

OUTPUTS = ("pil", "np", "pt", "latent")
GUIDANCE = 4.0
Generators = torch.Generator | Sequence[torch.Generator] | None


def checked_labels(class_labels: Any, classes: int) -> list[int]:
    """One or several classes, as a list."""
    given = class_labels
    if isinstance(given, Tensor | np.ndarray):
        given = given.flatten().tolist()
    single = isinstance(given, str) or not isinstance(given, Sequence | range)
    labels = [given] if single else list(given)
    for label in labels:
        if isinstance(label, str):
            raise UserError(f"class_labels: got {label!r}; get_label_ids finds classes by name")
        if not is_integer(label) or not 0 <= label < classes:
            raise UserError(f"class_labels: got {label!r}, expected 0 to {classes - 1}")
    if not labels:
        raise UserError("class_labels: got none, expected one or more")
    return [int(label) for label in labels]


def checked_names(id2label: Any, classes: int) -> dict[int, str]:
    """Names by class, as the constructor takes them; classes may be strings, as in JSON."""
    if id2label is None:
        return {}
    if not isinstance(id2label, Mapping):
        raise UserError(f"id2label: got {type(id2label).__name__}, expected names by class")
    names = {}
    for key, value in id2label.items():
        if not is_integer(key) and not (isinstance(key, str) and key.isascii() and key.isdecimal()):
            raise UserError(f"id2label: got the class {key!r}, expected a number")
        if not 0 <= int(key) < classes:
            raise UserError(f"id2label: got the class {key}, expected 0 to {classes - 1}")
        if not isinstance(value, str):
            raise UserError(f"id2label: got {value!r} for class {key}, expected a string")
        names[int(key)] = value
    return names


def checked_generator(generator: Any, count: int) -> Generators:
    """One generator for all images, or a list with one for each."""
    if not isinstance(generator, Sequence):
        if generator is not None and not isinstance(generator, torch.Generator):
            raise UserError(f"generator: got {type(generator).__name__}, expected a torch.Generator")
        return generator
    for one in generator:
        if not isinstance(one, torch.Generator):
            raise UserError(f"generator: got {type(one).__name__} in a list, expected a torch.Generator")
    if len(generator) != count:
        raise UserError(f"generator: got {len(generator)} in a list, expected one for each of {count} images")
    return list(generator)


def checked_scale(guidance_scale: Any, config: ModelConfig) -> float:
    """The guidance scale, 1 for no guidance; None: 4, or 1 for a model trained without label dropout."""
    if guidance_scale is None:
        return GUIDANCE if config.class_dropout_prob > 0 else 1.0
    scale = _number("guidance_scale", guidance_scale)
    if not math.isfinite(scale):
        raise UserError(f"guidance_scale: got {scale}, expected a finite number")
    if scale > 1 and config.class_dropout_prob == 0:
        raise UserError(
            f"guidance_scale: a model trained without label dropout cannot be guided; use 1, got {scale:g}"
        )
    return max(scale, 1.0)


def checked_power(scale_pow: Any) -> float | Literal["auto"] | None:
    """The power of the guidance schedule; "auto": as published."""
    if isinstance(scale_pow, str) and scale_pow == "auto":
        return "auto"
    return None if scale_pow is None else _number("scale_pow", scale_pow, "None, 'auto' or a number")


def checked_eta(eta: Any, taken: bool) -> float:
    """DDIM's noise; ``taken``: whether the scheduler takes it."""
    value = _number("eta", eta)
    if not 0 <= value <= 1 or (value and not taken):
        raise UserError(f"eta: got {eta}, expected 0 to 1 with DDIM, and 0 with others")
    return value


def checked_channels(guided_channels: Any, config: ModelConfig) -> int | None:
    """The number of channels to guide."""
    C = config.in_channels
    if guided_channels is None:
        return None
    if not is_integer(guided_channels) or not 1 <= guided_channels <= C:
        raise UserError(f"guided_channels: got {guided_channels!r}, expected 1 to {C}")
    return int(guided_channels)


def check_output(output_type: Any, config: ModelConfig, has_vae: bool) -> None:
    if not isinstance(output_type, str) or output_type not in OUTPUTS:
        hint = nearest(output_type, OUTPUTS)
        raise UserError(f"output_type: got {output_type!r}{hint}, expected {', '.join(OUTPUTS)}")
    if not has_vae and config.in_channels not in (1, 3) and output_type != "latent":
        raise UserError(
            f"output_type: {config.in_channels} channels make no picture without a vae; use 'latent'"
        )


def check_latents(latents: Any, shape: tuple[int, ...]) -> None:
    """``shape``: n, C, S, S."""
    if not isinstance(latents, Tensor):
        raise UserError(f"latents: got {type(latents).__name__}, expected a tensor or None")
    if not latents.is_floating_point():
        raise UserError(f"latents: dtype {latents.dtype}, expected a floating-point one such as float32")
    if tuple(latents.shape) != shape:
        raise UserError(f"latents: got {list(latents.shape)}, expected shape {list(shape)}")
    if not latents.isfinite().all():
        raise UserError("latents: got NaN or infinities, expected finite numbers")


def _number(name: str, value: Any, allowed: str = "a number") -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise UserError(f"{name}: got {value!r}, expected {allowed}".replace("\n", " "))
    return float(value)
