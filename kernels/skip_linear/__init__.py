"""MDTv2's long skip."""

from .op import skip_linear

__all__ = ["skip_linear"]
