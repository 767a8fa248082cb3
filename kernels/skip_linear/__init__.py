"""MDTv2's long skip connection."""

from .op import patch_skip_linear, skip_linear

__all__ = ["patch_skip_linear", "skip_linear"]
