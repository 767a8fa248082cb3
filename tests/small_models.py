"""Small models of each family with random weights; freshly initialised ones output zeros."""

from typing import Any

import torch
from torch import nn

from mdt_fast.config import Family, ModelConfig
from mdt_fast.models.zoo import build_model


def made(
    family: Family, dtype: torch.dtype = torch.float64, *, std: float = 0.1, **changes: Any
) -> nn.Module:
    """For 8 x 8 latents; every weight is drawn with spread ``std``, the same at each call."""
    shape: dict[str, Any] = {"input_size": 8, "patch_size": 2, "in_channels": 4, "hidden_size": 32}
    shape |= {"depth": 4, "num_heads": 2, "num_classes": 10, "decode_layer": 0 if family == "dit" else 2}
    torch.manual_seed(0)
    model = build_model(ModelConfig(family=family, **{**shape, **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=std)
    return model.to(dtype)
