"""Choose the tokens that a mask keeps, from one random number per token."""

from .op import MaskIds, mask_plan

__all__ = ["MaskIds", "mask_plan"]
