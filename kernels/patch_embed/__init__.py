"""Images to tokens."""

from .op import patch_embed

__all__ = ["patch_embed"]
