"""Linear layers in float8 by torchao: weights, inputs and gradients scaled to 8 bits for each product.

Master weights stay what they are, keys and shapes of the ``state_dict`` too. What it costs in learning is for
a run to show; it is no exact switch.
"""

from typing import Any

import torch
from torch import nn

from ..errors import UserError
from .base import Transformer

LAYERS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "skip_linear")
"""Of each block: products over tokens. The adaLN layers' are over samples, too few to win anything."""
CAPABILITY = (8, 9)
"""Ada and Hopper are the first GPUs with float8 products."""


def use_float8(model: Transformer, *, emulate: bool = False) -> int:
    """Replace the blocks' linear layers, in place; returns how many. Before compiling and sharding.

    ``emulate``: round to float8 and multiply as before, which any device can, slowly. Raises ``UserError``
    without torchao, on a device without float8 products, and for widths that are no multiples of 16.
    """
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    except ImportError as error:
        raise UserError(
            f"float8: needs torchao, which cannot be imported ({error}); pip install 'mdt-fast[fp8]'"
        ) from None
    device = model.pos_embed.device
    if not emulate and (device.type != "cuda" or torch.cuda.get_device_capability(device) < CAPABILITY):
        raise UserError(f"float8: needs a GPU of compute capability 8.9 or more, the model is on {device}")
    blocks = set(model.every_block())
    names = {
        f"{name}.{layer}"
        for name, module in model.named_modules()
        if module in blocks
        for layer in LAYERS
        if _has(module, layer)
    }
    for name in sorted(names):
        layer: Any = model.get_submodule(name)
        if layer.in_features % 16 or layer.out_features % 16:
            shape = f"{layer.in_features} to {layer.out_features}"
            raise UserError(f"float8: widths have to be multiples of 16; {name} is {shape}")
    # The number of tokens in a batch, which weight gradients sum over, is any number: it is padded.
    config = Float8LinearConfig(emulate=emulate, pad_inner_dim=True)
    convert_to_float8_training(model, config=config, module_filter_fn=lambda _, name: name in names)
    return len(names)


def _has(block: nn.Module, layer: str) -> bool:
    try:
        return isinstance(block.get_submodule(layer), nn.Linear)
    except AttributeError:
        return False
