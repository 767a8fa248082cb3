"""Gradient checkpointing of a block: the backward pass recomputes activations instead of keeping them."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from .own import OURS, home, is_watched

CHECKPOINTING = ("none", "selective", "full")

ATTENTION = ("rel_attention", "rel_attention_qkvpacked", "scaled_dot_product", "_flash_attn")


LAYERS = (nn.Linear, nn.SiLU, nn.Sequential)
"""The layers in a block, besides this package's modules and torchao's linear layers."""


def draws(block: nn.Module) -> bool:
    """Whether ``block`` may draw random numbers, as dropout does. Its standard parts never do. Hooks on the
    block itself do not count: they run outside of what is recomputed."""
    for module in block.modules():
        cls, itself = type(module), module is block
        if itself and isinstance(module, FSDPModule):
            cls = cls.__mro__[2]  # after FSDP's class for this block and FSDPModule comes the original class
        ours = cls in LAYERS or home(cls) in (OURS, "torchao")
        if not ours or ("forward" in vars(module) if itself else is_watched(module)):
            return True
    return False


def checkpointed(block: nn.Module, compute: Callable[..., Tensor], mode: str, *args: Any) -> Tensor:
    """A block's ``compute(*args)``. The ``selective`` mode keeps the outputs of attention, which takes the
    most time per byte it stores. A block calls this inside its forward, so compiling a block includes it."""
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": draws(block)}
    if mode == "selective":
        compute = partial(_casting_anew, compute)
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)
    return checkpoint(compute, *args, **options)


def _casting_anew(compute: Callable[..., Tensor], *args: Any) -> Tensor:
    """``compute(*args)`` without autocast's cache of cast weights. A second pass would find casts in it that
    a recomputation, which starts with an empty cache, has to make; selective mode cannot match the two."""
    kind = args[0].device.type
    if torch.compiler.is_compiling() or kind == "meta" or not torch.is_autocast_enabled(kind):
        return compute(*args)
    with torch.autocast(kind, dtype=torch.get_autocast_dtype(kind), cache_enabled=False):
        return compute(*args)


def _policy(_: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    name = str(getattr(op, "_opname", op))
    keep = any(part in name for part in ATTENTION) and not name.endswith("_bwd")
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE
