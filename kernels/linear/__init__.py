"""A linear layer that uses the fastest available library for its products."""

from .op import linear

__all__ = ["linear"]
