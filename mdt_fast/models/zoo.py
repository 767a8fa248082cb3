"""The published models by name.

``MDTv2_{S,B,L,XL}_2``, ``MDT_{S,B,L,XL}_{2,4,8}`` and ``DiT_{S,B,L,XL}_{2,4,8}``.
"""

from collections.abc import Callable
from typing import Any, Literal

from torch import nn

from .. import reference
from ..config import Family, ModelConfig
from ..errors import UserError, nearest
from ..presets import PATCHES, SIZES
from .base import Transformer
from .dit import DiT
from .mdt import MDT, MDTv2

Implementation = Literal["fast", "reference"]

CLASSES: dict[Implementation, dict[Family, Callable[..., nn.Module]]] = {
    "fast": {"mdtv2": MDTv2, "mdt": MDT, "dit": DiT},
    "reference": {"mdtv2": reference.MDTv2, "mdt": reference.MDT, "dit": reference.DiT},
}

SHAPES: dict[str, tuple[Family, dict[str, int]]] = {
    f"{prefix}_{size}_{patch}": (family, {**shape, "patch_size": patch})
    for family, (prefix, patches) in PATCHES.items()
    for size, shape in SIZES.items()
    for patch in patches
}


def _factory(name: str) -> Callable[..., Transformer]:
    family, shape = SHAPES[name]
    cls: Any = CLASSES["fast"][family]

    def make_model(**kwargs: Any) -> Transformer:
        return cls(**shape, **kwargs)

    make_model.__name__ = make_model.__qualname__ = name
    sizes = ", ".join(f"{key}={value}" for key, value in shape.items())
    make_model.__doc__ = f"``{cls.__name__}({sizes}, **kwargs)``; other arguments as in the class."
    return make_model


FACTORIES: dict[str, Callable[..., Transformer]] = {name: _factory(name) for name in SHAPES}
"""The constructor of every published model, by name."""

MDTv2_S_2 = FACTORIES["MDTv2_S_2"]
MDTv2_B_2 = FACTORIES["MDTv2_B_2"]
MDTv2_L_2 = FACTORIES["MDTv2_L_2"]
MDTv2_XL_2 = FACTORIES["MDTv2_XL_2"]
MDT_S_2 = FACTORIES["MDT_S_2"]
MDT_S_4 = FACTORIES["MDT_S_4"]
MDT_S_8 = FACTORIES["MDT_S_8"]
MDT_B_2 = FACTORIES["MDT_B_2"]
MDT_B_4 = FACTORIES["MDT_B_4"]
MDT_B_8 = FACTORIES["MDT_B_8"]
MDT_L_2 = FACTORIES["MDT_L_2"]
MDT_L_4 = FACTORIES["MDT_L_4"]
MDT_L_8 = FACTORIES["MDT_L_8"]
MDT_XL_2 = FACTORIES["MDT_XL_2"]
MDT_XL_4 = FACTORIES["MDT_XL_4"]
MDT_XL_8 = FACTORIES["MDT_XL_8"]
DiT_S_2 = FACTORIES["DiT_S_2"]
DiT_S_4 = FACTORIES["DiT_S_4"]
DiT_S_8 = FACTORIES["DiT_S_8"]
DiT_B_2 = FACTORIES["DiT_B_2"]
DiT_B_4 = FACTORIES["DiT_B_4"]
DiT_B_8 = FACTORIES["DiT_B_8"]
DiT_L_2 = FACTORIES["DiT_L_2"]
DiT_L_4 = FACTORIES["DiT_L_4"]
DiT_L_8 = FACTORIES["DiT_L_8"]
DiT_XL_2 = FACTORIES["DiT_XL_2"]
DiT_XL_4 = FACTORIES["DiT_XL_4"]
DiT_XL_8 = FACTORIES["DiT_XL_8"]


DiT_models = {
    name.replace("_", "-", 1).replace("_", "/"): FACTORIES[name] for name in SHAPES if name[0] == "D"
}
"""DiT's constructors under the names used in its original code: ``DiT_models["DiT-XL/2"]``."""


def shape_of(name: str) -> tuple[Family, dict[str, int]]:
    """Family and sizes of a published model; ``UserError`` (with the nearest name) for an unknown name."""
    if name not in SHAPES:
        raise UserError(f"model: got {name!r}{nearest(name, SHAPES)}, expected {', '.join(SHAPES)}")
    return SHAPES[name]


def model_config(name: str, **overrides: Any) -> ModelConfig:
    """The configuration of a published model; ``overrides`` replace any of its values."""
    family, shape = shape_of(name)
    return ModelConfig.of(family, **{**shape, **overrides})


def build_model(config: ModelConfig, implementation: Implementation = "fast") -> nn.Module:
    """A new model of this configuration, as a fast or as a reference class."""
    if implementation not in CLASSES:
        hint = nearest(implementation, CLASSES)
        raise UserError(f"implementation: got {implementation!r}{hint}, expected {', '.join(CLASSES)}")
    return CLASSES[implementation][config.family](**config.kwargs())


def make(name: str, *, implementation: Implementation = "fast", **kwargs: Any) -> nn.Module:
    """A new published model by name; ``kwargs`` are its constructor's."""
    return build_model(model_config(name, **kwargs), implementation)
