"""A linear layer, by whichever library multiplies fastest."""

from .op import linear

__all__ = ["linear"]
