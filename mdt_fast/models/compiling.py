"""``torch.compile`` for a training step: the whole model, or block by block."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from ..masking import MaskPlan
from .base import Transformer
from .rows import Rows

SCOPES = ("model", "block")
RECOMPILE_LIMIT = 64


def compile_for_training(model: Transformer, scope: str = "block", **options: Any) -> None:
    """Compile ``model``, in place: its ``forward`` and, in MDT, ``training_step_outputs``.

    ``scope``: ``model`` compiles them whole, ``block`` each block alone (a fraction of the time, as equal
    blocks share one compilation; what FSDP needs). ``options`` are those of ``torch.compile``; graphs are
    always full. The number of kept tokens is dynamic: no length compiles anew. Call it after
    ``set_switches``, ``set_checkpointing`` and ``set_attention_backend``, and after ``to``.
    Raises ``UserError`` for another scope, and for what wraps a model.
    """
    if scope not in SCOPES:
        raise UserError(f"scope: got {scope!r}, allowed are {', '.join(SCOPES)}")
    if not isinstance(model, Transformer):
        raise UserError(
            f"model: got a {type(model).__name__}, allowed are this package's models; compile before wrapping"
        )
    options = {"fullgraph": True} | options
    # All blocks share one cache: encoder, decoder and side block, with gradients and without, each counts.
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, RECOMPILE_LIMIT)
    vars(model)["mark_lengths"] = mark
    if scope == "block":
        for block in model.every_block():
            block.compile(**options)
        return
    model.compile(**options)
    step = getattr(type(model), "training_step_outputs", None)
    if step is not None:
        # Not a bound method: a deep copy of the model has to run its own weights.
        vars(model)["training_step_outputs"] = partial(_drawn_first, torch.compile(step, **options), model)


def _drawn_first(
    step: Any,
    model: Any,
    x_full: Tensor,
    x_masked: Tensor,
    t: Tensor,
    y: Tensor,
    y_masked: Tensor | None = None,
    mask_plan: MaskPlan | None = None,
) -> tuple[Tensor, Tensor]:
    """``training_step_outputs`` by ``step``, which is compiled; what it would draw is drawn before it."""
    model.check_step_inputs(x_full, x_masked, t, y, y_masked)
    if y_masked is None:
        y, y_masked = model.drop_labels(y), model.drop_labels(y)
    if mask_plan is None:
        mask_plan = model.draw_plan(len(t), x_masked.device)
    result: tuple[Tensor, Tensor] = step(model, x_full, x_masked, t, y, y_masked, mask_plan)
    return result


def mark(x: Tensor, rows: Rows, plan: MaskPlan) -> None:
    """Declare the sizes that follow the number of kept tokens, so that the first compilation serves all."""
    if torch.compiler.is_compiling():
        return
    for tensor, dim in ((x, x.ndim - 2), (rows.positions, -1), (plan.ids_keep, 1), (plan.ids_mask, 1)):
        if tensor is not None:
            torch._dynamo.maybe_mark_dynamic(tensor, dim % tensor.ndim)
