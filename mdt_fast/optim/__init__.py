"""Optimisers whose whole step is one sweep over memory; they replace torch's AdamW and timm's Adan."""

from .fused import FusedAdamW, FusedAdan

__all__ = ["FusedAdamW", "FusedAdan"]
