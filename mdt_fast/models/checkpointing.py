"""Gradient checkpointing of a block: what is computed again in the backward pass instead of being kept."""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

CHECKPOINTING = ("none", "selective", "full")

ATTENTION = ("rel_attention", "rel_attention_qkvpacked", "scaled_dot_product", "_flash_attn")


LAYERS = (nn.Linear, nn.SiLU, nn.Sequential)
"""What a block is made of, beside this package's modules and torchao's linear layers."""


def draws(block: nn.Module) -> bool:
    """Whether ``block`` may draw random numbers, as dropout does: none of its own parts do. Its own hooks run
    outside of what is computed again."""
    for module in block.modules():
        cls, itself = type(module), module is block
        if itself and isinstance(module, FSDPModule):
            cls = cls.__mro__[2]  # FSDP's class of this block, FSDPModule, and what it was
        ours = cls in LAYERS or cls.__module__.partition(".")[0] in ("mdt_fast", "torchao")
        hooked = not itself and (module._forward_hooks or module._forward_pre_hooks)
        if not ours or hooked or "forward" in vars(module):
            return True
    return False


def checkpointed(block: nn.Module, compute: Callable[..., Tensor], mode: str, *args: Any) -> Tensor:
    """``compute(*args)`` of a block. In ``selective`` mode the outputs of attention are kept: it costs the
    most time for the bytes it leaves behind. A block does this inside, so that it is compiled around it."""
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": draws(block)}
    if mode == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)
    return checkpoint(compute, *args, **options)


def _policy(_: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    name = str(getattr(op, "_opname", op))
    keep = any(part in name for part in ATTENTION) and not name.endswith("_bwd")
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE
