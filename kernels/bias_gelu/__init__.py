"""Bias and GELU of the MLP's first layer, alone or fused with its second layer."""

from .linear import gelu_linear
from .op import bias_gelu

__all__ = ["bias_gelu", "gelu_linear"]
