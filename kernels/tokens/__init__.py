"""Taking tokens out and putting them back: the masking's data movement."""

from .op import gather_tokens, merge_tokens, unmask_tokens

__all__ = ["gather_tokens", "merge_tokens", "unmask_tokens"]
