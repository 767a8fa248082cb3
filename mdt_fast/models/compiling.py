"""``torch.compile`` for a training step: the whole model, or one block at a time."""

from collections.abc import Callable
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
    """Compile ``model`` in place: its ``forward`` and, in MDT, ``training_step_outputs``.

    ``scope``: ``model`` compiles each of these as a whole. ``block`` compiles each block on its own: it takes
    a fraction of the time, as equal blocks share one compilation, and FSDP needs it. ``options`` are passed
    to ``torch.compile``; graphs are always full (``fullgraph``). The number of kept tokens is dynamic, so a
    new length does not recompile. Call this after ``set_switches``, ``set_checkpointing``,
    ``set_attention_backend`` and ``to``. Raises ``UserError`` for another scope, and for a wrapped model.
    """
    if scope not in SCOPES:
        raise UserError(f"scope: got {scope!r}, expected {', '.join(SCOPES)}")
    if not isinstance(model, Transformer):
        raise UserError(
            f"model: got a {type(model).__name__}, expected this package's models; compile before wrapping"
        )
    options = {"fullgraph": True} | options
    # All blocks share one cache: encoder, decoder and side block, with and without gradients, add entries.
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
        # Not a bound method: a deep copy of the model must run with its own weights.
        vars(model)["training_step_outputs"] = partial(_drawn_first, _Compiled(step, options), model)


class _Compiled:
    """A compiled function. Copies of a model share it; pickled, it becomes the plain ``function``, just as
    PyTorch's compiled modules become plain ones."""

    def __init__(self, function: Callable[..., Any], options: dict[str, Any]):
        self.function, self.compiled = function, torch.compile(function, **options)

    def __call__(self, *args: Any) -> Any:
        return self.compiled(*args)

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Compiled":
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return partial, (self.function,)


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
    """Draw the random numbers of ``training_step_outputs`` first, then run it compiled (``step``)."""
    model.check_step_inputs(x_full, x_masked, t, y, y_masked)
    if y_masked is None and not (model.training and model.drops_by_itself):
        y, y_masked = model.drop_labels(y), model.drop_labels(y)
    if mask_plan is None:
        mask_plan = model.draw_plan(len(t), x_masked.device)
    result: tuple[Tensor, Tensor] = step(model, x_full, x_masked, t, y, y_masked, mask_plan)
    return result


def mark(x: Tensor, rows: Rows, plan: MaskPlan) -> None:
    """Mark the sizes that depend on the number of kept tokens as dynamic, so one compilation serves all."""
    if torch.compiler.is_compiling():
        return
    for tensor, dim in ((x, x.ndim - 2), (rows.positions, -1), (plan.ids_keep, 1), (plan.ids_mask, 1)):
        if tensor is not None:
            torch._dynamo.maybe_mark_dynamic(tensor, dim % tensor.ndim)
