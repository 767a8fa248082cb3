"""Initial weights (specification, section 5), drawn in the official order: equal seed, equal weights."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from .embed import sincos_position_table


def initialise(model: Any, grid_size: int) -> None:
    """Set the initial weights of a newly constructed MDT, MDTv2 or DiT (reference or fast).

    Relative position tables keep the values from their constructor. adaLN and the output layer start at zero,
    so a new model outputs zero everywhere.
    """
    model.apply(_xavier)

    for name in ("pos_embed", "decoder_pos_embed"):
        if (parameter := getattr(model, name, None)) is not None:
            parameter.data.copy_(sincos_position_table(parameter.shape[2], grid_size)[None])

    projection = model.x_embedder.proj
    nn.init.xavier_uniform_(projection.weight.data.flatten(1))
    nn.init.zeros_(projection.bias)
    nn.init.normal_(model.y_embedder.embedding_table.weight, std=0.02)
    nn.init.normal_(model.t_embedder.mlp[0].weight, std=0.02)
    nn.init.normal_(model.t_embedder.mlp[2].weight, std=0.02)

    for name, parameter in model.named_parameters():
        if "adaLN_modulation" in name or name.startswith("final_layer.linear"):
            nn.init.zeros_(parameter)
    if getattr(model, "mask_ratio", None) is not None:
        nn.init.normal_(model.mask_token, std=0.02)


def _xavier(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)


@torch.no_grad()
def init_bias_table(table: Tensor) -> None:
    """N(0, 0.02) truncated at +-2, by inverting the normal distribution: one uniform number per entry.

    The truncation is 100 standard deviations out, so the uniform numbers cover all of (-1, 1).
    ``nn.init.trunc_normal_`` draws differently in different torch versions.
    """
    table.uniform_(-1, 1).erfinv_().mul_(0.02 * math.sqrt(2)).clamp_(-2, 2)
