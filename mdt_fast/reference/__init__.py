"""The exact models in plain PyTorch, written for reading: what the fast ones are checked against."""

from .models import MDT, DiT, MDTv2

__all__ = ["MDT", "DiT", "MDTv2"]
