"""The exact models in plain PyTorch, written to be read; the fast models are checked against them."""

from .models import MDT, DiT, MDTv2

__all__ = ["MDT", "DiT", "MDTv2"]
