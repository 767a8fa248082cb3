"""Linear layers in float8: each product's operands are rounded to 8 bits, those of weights' gradients stay.

Master weights stay what they are, keys and shapes of the ``state_dict`` too. What it costs in learning is for
a run to show; it is no exact switch.
"""

from typing import Any, Literal

import torch
from torch import nn

from ..config import ModelConfig
from ..errors import UserError, not_importable
from ..kernels.float8.registered import CAPABILITIES, MULTIPLE, multiplies
from .base import Transformer
from .ops import Float8Linear, is_readable

LAYERS = {
    "kernels": ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"),
    "torchao": ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "skip_linear"),
}
"""Of each block: products over tokens. The adaLN layers' are over samples, too few to win anything, and of a
long skip this package computes a part of low rank."""


def use_float8(
    model: Transformer, by: Literal["kernels", "torchao"] = "kernels", *, emulate: bool = False
) -> int:
    """Have the blocks' linear layers multiply in float8, in place; returns how many. Before compiling and
    sharding.

    ``by``: this package's kernels, for training and sampling, each row of activations, gradients and weights
    with a scale of its own; or torchao, for training (it scales whole tensors, weights' gradients are in
    float8, too, and ``torch.compile`` is what makes it fast). ``emulate``: round to float8 and multiply as
    before, which any device can, slowly. Raises ``UserError`` on a device without float8 products, for widths
    that are no multiples of 16, and where torchao is asked for and not there.
    """
    if not isinstance(by, str) or by not in LAYERS:
        raise UserError(f"by: got {by!r}, allowed are {' and '.join(map(repr, LAYERS))}")
    if not isinstance(model, Transformer):
        raise UserError(f"model: got a {type(model).__name__}, allowed are this package's models")
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
    """By whom layers are in float8 already."""
    for module in model.modules():
        if type(module) is Float8Linear:
            return "kernels"
        if type(module).__module__.startswith("torchao.float8"):
            return "torchao"
    return None


def check_float8(device: torch.device, config: ModelConfig | None = None) -> None:
    """``UserError`` where there are no products in float8, or none of these widths."""
    if config is not None:
        for width in (config.hidden_size, int(config.hidden_size * config.mlp_ratio)):
            if width % MULTIPLE:
                raise UserError(f"float8: widths have to be multiples of {MULTIPLE}; the model has {width}")
    if not multiplies(device):
        needed = ", ".join(f"{major}.{minor}" for major, minor in CAPABILITIES)
        raise UserError(f"float8: needs a GPU of compute capability {needed}, the model is on {device}")


def _names(model: Transformer, by: str) -> list[str]:
    """The layers to be replaced: those that are no others yet."""
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
    # The number of tokens in a batch, which weight gradients sum over, is any number: it is padded.
    config = Float8LinearConfig(emulate=emulate, pad_inner_dim=True)

    def convert(model: nn.Module, names: list[str]) -> None:
        chosen = set(names)
        convert_to_float8_training(model, config=config, module_filter_fn=lambda _, name: name in chosen)

    return convert
