"""Products in float8: rows of both operands are rounded to 8 bits, each with a scale of its own."""

from .op import quantize_rows, quantize_weight

__all__ = ["quantize_rows", "quantize_weight"]
