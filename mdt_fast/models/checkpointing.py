"""Gradient checkpointing of a block: what is computed again in the backward pass instead of being kept."""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

CHECKPOINTING = ("none", "selective", "full")

ATTENTION = ("rel_attention", "rel_attention_qkvpacked", "scaled_dot_product", "_flash_attn")


def checkpointed(compute: Callable[..., Tensor], mode: str, *args: Any) -> Tensor:
    """``compute(*args)`` of a block. In ``selective`` mode the outputs of attention are kept: it costs the
    most time for the bytes it leaves behind. A block does this inside, so that it is compiled around it."""
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}  # a block draws nothing
    if mode == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)
    return checkpoint(compute, *args, **options)


def _policy(_: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    name = str(getattr(op, "_opname", op))
    keep = any(part in name for part in ATTENTION) and not name.endswith("_bwd")
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE
