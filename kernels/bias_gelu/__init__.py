"""Bias and GELU of the MLP's first layer."""

from .op import bias_gelu

__all__ = ["bias_gelu"]
