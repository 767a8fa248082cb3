"""Attention with a learnt relative position bias."""

from .op import rel_attention, rel_attention_qkvpacked
from .reference import relative_bias

__all__ = ["rel_attention", "rel_attention_qkvpacked", "relative_bias"]
