"""Products in float8: the rows of both operands are quantized to 8 bits, each with its own scale."""

from .op import quantize_rows, quantize_weight

__all__ = ["quantize_rows", "quantize_weight"]
