"""Data movement of masking: take tokens out and put them back."""

from .op import gather_tokens, merge_tokens, unmask_tokens

__all__ = ["gather_tokens", "merge_tokens", "unmask_tokens"]
