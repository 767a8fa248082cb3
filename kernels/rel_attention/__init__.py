"""Attention with a learnt relative position bias."""

from .op import rel_attention
from .reference import relative_bias

__all__ = ["rel_attention", "relative_bias"]
