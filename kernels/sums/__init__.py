"""Sums over rows, for bias gradients and for adding up partial sums."""

from .op import sum_rows

__all__ = ["sum_rows"]
