"""Sums over rows: what a bias's gradient is, and what partial sums come to."""

from .op import sum_rows

__all__ = ["sum_rows"]
