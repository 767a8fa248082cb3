"""What a sampler asks of a model: times and labels of all steps are known before the first one.

n images, B rows: n, or 2n with guidance (n with their classes, then n with the null class); U different
labels, D width, W numbers of all modulations of a row.
"""

import copy
from collections.abc import Iterator, Sequence
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..masking import MaskPlan
from .base import Transformer
from .blocks import both_skips
from .conditioning import FINAL, Conditioning
from .ops import is_plain

CHUNK_BYTES = 2**28
"""Memory for the modulations of a chunk of steps."""


def is_open(model: nn.Module) -> TypeGuard[Transformer]:
    """Whether a pass may be put together from the model's parts.

    Not where something of its own surrounds the whole forward pass: hooks (FSDP's, too), another ``forward``
    put in front of it (accelerate's, which brings weights to the GPU) or ``torch.compile``.
    """
    hooks = model._forward_hooks or model._forward_pre_hooks
    surrounded = hooks or "forward" in vars(model) or model._compiled_call_impl is not None
    return isinstance(model, Transformer) and not surrounded


def guided_pass(
    model: Transformer,
    x: Tensor,
    c: Conditioning,
    plan: MaskPlan | None = None,
    *,
    guided: bool,
    shared: bool,
) -> Tensor:
    """The model's output [B, O, S, S] for images x [n, C, S, S]; ``c`` of all B rows.

    ``plan``: which tokens of the n images the encoder sees (None: all). ``guided``: B is 2n. ``shared``: the
    patches of both halves are the same, and are embedded once.
    """
    both = plan if plan is None or not guided else plan.twice()
    if guided and not shared:
        x, plan = torch.cat([x, x]), both
    parts: Any = model  # every family has both
    tokens, skip = parts.embed(x, plan)
    if guided and shared:
        tokens, skip = torch.cat([tokens, tokens]), both_skips(skip, skip)
    return parts.from_tokens(tokens, skip, c, both)


class CastWeights:
    """``model``: a copy of the given one that gives the same numbers. Its blocks have their linear layers'
    weights in ``dtype``, autocast's, as they were at the latest :meth:`refresh`; all else is shared."""

    def __init__(self, model: Transformer, dtype: torch.dtype):
        memo: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
        self.whole: list[Tensor] = []
        self.cast: list[Tensor] = []
        for layer in _layers_of_steps(model):
            if layer.weight.dtype != dtype and memo[id(layer.weight)] is layer.weight:
                cast = torch.empty_like(layer.weight, dtype=dtype, requires_grad=False)
                memo[id(layer.weight)] = nn.Parameter(cast, requires_grad=False)
                self.whole.append(layer.weight)
                self.cast.append(cast)
        self.model: Transformer = copy.deepcopy(model, memo)

    @torch.no_grad()
    def refresh(self) -> None:
        """From the weights as they are now."""
        torch._foreach_copy_(self.cast, self.whole)

    @staticmethod
    def serve(model: Transformer, device: torch.device) -> bool:
        """Whether a copy is the same model: nothing but its weights says what it computes."""
        if any(type(p) is not nn.Parameter or p.device != device for p in model.parameters()):
            return False
        return not any(
            module._forward_hooks
            or module._forward_pre_hooks
            or "forward" in vars(module)
            or module._compiled_call_impl is not None
            for module in model.modules()
        )


def _layers_of_steps(model: Transformer) -> Iterator[nn.Linear]:
    """Linear layers that every step runs: modulations can be computed for many steps at once."""
    for block in model.every_block():
        for name, layer in block.named_modules():
            if is_plain(layer) and "adaLN_modulation" not in name:
                yield layer


class StepModulations:
    """The modulations of all blocks and of the last layer, computed for a chunk of steps at a time.

    One product per layer and chunk, with a row for each step and each label that occurs: the weights, a third
    of the model's, are read once per chunk, and the null class costs one row a step. ``times``: the original
    timestep of each step's index; steps are asked for from the last index down.
    """

    def __init__(
        self, model: Transformer, times: Sequence[float], labels: Tensor, chunk_bytes: int = CHUNK_BYTES
    ):
        blocks = [
            block
            for name, block in model.named_modules()
            if isinstance(getattr(block, "adaLN_modulation", None), nn.Sequential)
            and not name.startswith("sideblocks")  # those of masked passes
        ]
        self.layers: list[Any] = [block.adaLN_modulation[1] for block in blocks]
        self.keys = [FINAL if block is model.final_layer else int(block.index) for block in blocks]
        self.widths = [layer.out_features for layer in self.layers]
        self.model, self.labels = model, labels
        self.times = torch.tensor(times, device=labels.device)
        weight = next(model.parameters())
        row = len(labels) * sum(self.widths) * weight.element_size()
        self.chunk = max(1, min(len(times), chunk_bytes // row))
        self.first, self.values = len(times), weight.new_empty(0)

    def __call__(self, index: int, rows: Tensor) -> Tensor:
        """[B, W] of the step ``index``, row i for ``labels[rows[i]]``."""
        if not self.first <= index < self.first + len(self.values):
            self._compute(max(0, index + 1 - self.chunk), index + 1)
        return self.values[index - self.first].index_select(0, rows)

    def conditioning(self, modulations: Tensor) -> Conditioning:
        """[B, W] as the blocks take it."""
        parts = modulations.split(self.widths, dim=1)
        return Conditioning(modulations[:, :0], dict(zip(self.keys, parts, strict=True)))

    def _compute(self, first: int, end: int) -> None:
        self.values = self.values[:0]  # before the next chunk needs the memory
        t, y = self.model.t_embedder(self.times[first:end]), self.model.y_embedder(self.labels, False)
        c = F.silu(t[:, None] + y).flatten(0, 1)
        values, start = c.new_empty(0), 0
        for layer, width in zip(self.layers, self.widths, strict=True):
            part = layer(c)
            if not start:
                values = part.new_empty(len(c), sum(self.widths))
            values[:, start : start + width] = part
            start += width
        self.first, self.values = first, values.unflatten(0, (end - first, len(self.labels)))
