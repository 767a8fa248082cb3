"""Linear layers in float8: each product's operands are rounded to 8 bits, except for weight gradients.

Master weights are unchanged, and so are the ``state_dict``'s keys and shapes. This is not an exact switch:
only a training run shows what it costs in quality.
"""

from typing import Any, Literal

import torch
from torch import nn

from ..config import ModelConfig
from ..errors import UserError, not_importable
from ..kernels.float8.registered import CAPABILITIES, MULTIPLE, multiplies
from .base import Transformer
from .ops import Float8Linear
from .own import is_readable

LAYERS = {
    "kernels": ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"),
    "torchao": ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "skip_linear"),
}
"""The layers of each block, whose products are over tokens. The adaLN layers' products are over samples, too
few to gain anything, and for a long skip this package computes a low-rank part."""


def use_float8(
    model: Transformer, by: Literal["kernels", "torchao"] = "kernels", *, emulate: bool = False
) -> int:
    """Make the blocks' linear layers multiply in float8, in place; returns the number of layers. Call it
    before compiling and sharding.

    ``by``: this package's kernels, for training and sampling, with a scale for each row of activations,
    gradients and weights; or torchao, for training (one scale per tensor, weight gradients in float8 too, and
    fast only with ``torch.compile``). ``emulate``: round to float8, then multiply as before; works on any
    device, but is slow. Raises ``UserError`` on a device without float8 products, for widths that are not
    multiples of 16, and if torchao is requested but not installed.
    """
    if not isinstance(by, str) or by not in LAYERS:
        raise UserError(f"by: got {by!r}, expected {' or '.join(map(repr, LAYERS))}")
    if not isinstance(model, Transformer):
        raise UserError(f"model: got a {type(model).__name__}, expected this package's models")
    convert = _torchao(emulate) if by == "torchao" else None
    if (other := _converted(model)) not in (None, by):
        raise UserError(f"by: got {by!r}, but the model has layers in float8 by {other!r}")
    if not emulate:
        check_float8(model.pos_embed.device)
    names = _names(model, by)
    if convert is not None:
        convert(model, names)
    else:
        for name in names:
            model.get_submodule(name).__class__ = Float8Linear
    return len(names)


def _converted(model: nn.Module) -> str | None:
    """Which implementation has already converted layers to float8, if any."""
    for module in model.modules():
        if type(module) is Float8Linear:
            return "kernels"
        if type(module).__module__.startswith("torchao.float8"):
            return "torchao"
    return None


def check_float8(device: torch.device, config: ModelConfig | None = None) -> None:
    """Raise ``UserError`` if the device has no float8 products, or none for these widths."""
    if config is not None:
        for width in (config.hidden_size, int(config.hidden_size * config.mlp_ratio)):
            if width % MULTIPLE:
                raise UserError(f"float8: widths have to be multiples of {MULTIPLE}; the model has {width}")
    if not multiplies(device):
        needed = ", ".join(f"{major}.{minor}" for major, minor in CAPABILITIES)
        raise UserError(f"float8: needs a GPU of compute capability {needed}, the model is on {device}")


def _names(model: Transformer, by: str) -> list[str]:
    """The layers to replace: those not replaced yet."""
    blocks, names = set(model.every_block()), []
    for prefix, module in model.named_modules():
        for layer in LAYERS[by] if module in blocks else ():
            name = f"{prefix}.{layer}"
            linear = _find(model, name)
            if linear is None:
                continue
            if not is_readable(linear.weight):
                raise UserError(f"float8: the weight of {name} is a {type(linear.weight).__name__} already")
            if linear.in_features % MULTIPLE or linear.out_features % MULTIPLE:
                shape = f"{linear.in_features} to {linear.out_features}"
                raise UserError(f"float8: widths have to be multiples of {MULTIPLE}; {name} is {shape}")
            names.append(name)
    return names


def _find(model: nn.Module, name: str) -> nn.Linear | None:
    try:
        layer = model.get_submodule(name)
    except AttributeError:
        return None
    return layer if type(layer) is nn.Linear else None


def _torchao(emulate: bool) -> Any:
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    except ImportError as error:
        raise not_importable("float8: needs torchao", error, "fp8") from None
    # Weight gradients sum over the tokens in a batch, whose number is arbitrary: torchao pads it.
    config = Float8LinearConfig(emulate=emulate, pad_inner_dim=True)

    def convert(model: nn.Module, names: list[str]) -> None:
        chosen = set(names)
        convert_to_float8_training(model, config=config, module_filter_fn=lambda _, name: name in chosen)

    return convert
