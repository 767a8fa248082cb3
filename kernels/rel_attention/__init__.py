"""Attention with a learned relative position bias."""

from .backends import attention_backends
from .op import rel_attention, rel_attention_qkvpacked
from .reference import relative_bias

__all__ = ["attention_backends", "rel_attention", "rel_attention_qkvpacked", "relative_bias"]
