"""A training step's passes for a loop of one's own. B samples, [C, S, S] each."""

from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from ..config import TrainConfig, check_types
from ..diffusion import GaussianDiffusion
from ..errors import UserError
from ..models.base import Transformer
from .objective import Draws, draw
from .passes import GraphedPasses, Passes


class TrainingStep:
    """MDT's objective, forward and backward: ``step(x, y)`` leaves the gradients in the parameters.

    Both passes (over all tokens, and over kept ones; DiT has the first alone) run as one batch, with what is
    random drawn as the trainer draws it. On a GPU they are one CUDA graph for each number of kept tokens,
    captured when that is first met: MDTv2-S/2 took 7 ms instead of 110 at batch 4, XL/2 114 instead of 156 at
    32 (an H200). A graph's gradients are written over by the next step.

    ``model``: one of this package, on its device and in training mode, compiled by
    :func:`mdt_fast.compile_for_training` or not. ``dtype``: what passes compute in (autocast). ``passes``:
    ``together``, or ``in_turn``, each with its own backward pass, for less memory. ``accumulate``: so many
    calls of equal batches share an update, whose gradients are their mean, and the number of kept tokens; the
    first of them begins anew. ``cuda_graphs``: None where they go, on a GPU without shards; what is changed
    later around the model's layers (hooks, switches) a graph does not see, weights in other memory it does.
    Raises ``UserError`` for another model.
    """

    def __init__(
        self,
        model: Transformer,
        diffusion: GaussianDiffusion,
        *,
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        passes: Literal["together", "in_turn"] = "together",
        accumulate: int = 1,
        cuda_graphs: bool | None = None,
    ):
        if not isinstance(model, Transformer):
            raise UserError(f"model: got a {type(model).__name__}, allowed are this package's models")
        self.model, self.diffusion, self.calls = model, diffusion, 0
        self.settings = TrainConfig(dtype=dtype, passes=passes, accumulate=accumulate)
        check_types(self.settings)
        if accumulate < 1:
            raise UserError(f"accumulate: must be at least 1, got {accumulate}")
        device, sharded = next(model.parameters()).device, isinstance(model, FSDPModule)
        if cuda_graphs and (device.type != "cuda" or sharded):
            where = "a model that FSDP shards" if sharded else f"a model on {str(device)!r}"
            raise UserError(f"cuda_graphs: for a CUDA device without shards, got {where}")
        self.graphed = not sharded and device.type == "cuda" if cuda_graphs is None else cuda_graphs
        self.sharded = sharded
        self.passes: Passes | GraphedPasses | None = None
        self.made_for: list[tuple[int, bool]] = []
        self.draws: Draws | None = None

    def __call__(
        self, x: Tensor, y: Tensor, t: Tensor | None = None, *, scale: Tensor | None = None
    ) -> dict[str, Tensor]:
        """The loss terms [B] of images or latents ``x`` [B, C, S, S] with labels ``y`` [B] (int64; what an
        embedder of one's own takes, [B, ...]), both on the model's device: ``loss``, ``mse``, ``vb``, and of
        the masked pass ``m_loss``, ``m_mse``, ``m_vb``.

        Gradients are those of the mean ``loss`` and the mean ``m_loss`` together, times ``scale`` (float16's,
        a tensor of one number). ``t`` [B]: timesteps, drawn evenly if None.
        """
        device = next(self.model.parameters()).device
        for name, given in (("x", x), ("y", y)):
            if given.device != device:
                raise UserError(f"{name}: on {given.device}, the model is on {device}")
        B, parts = len(x), self.settings.accumulate
        part = self.calls % parts
        if part == 0 or self.passes is None or self.draws is None:
            self.calls = part = 0
            self.passes = self._passes(device)
            self.passes.zero_grad()
            self.draws = draw(self.model, self.diffusion, parts * B, device)  # as many kept in all parts
        elif len(self.draws.t) != parts * B:
            others = len(self.draws.t) // parts
            raise UserError(f"x: batch of {B}, the other parts of this update have {others}")
        draws = self.draws.rows(slice(part * B, (part + 1) * B))
        if not self.model.takes_labels:
            masked = None if draws.plan is None else self.model.drop_labels(y)
            draws = replace(draws, given=self.model.drop_labels(y), given_masked=masked)
        if t is not None:
            self.diffusion.check_timesteps(t, x)
            draws = replace(draws, t=t)
        terms = self.passes(x, y, draws, scale, part + 1 == parts)
        self.calls += 1
        return terms

    def _passes(self, device: torch.device) -> Passes | GraphedPasses:
        """New ones where graphs would read weights in other memory, or others are frozen now."""
        before = self.made_for
        if self.graphed:
            self.made_for = [(p.data_ptr(), p.requires_grad) for p in self.model.parameters()]
        if self.passes is None or self.made_for != before:
            made = Passes(self.model, self.diffusion, self.settings, self.sharded, device)
            self.passes = GraphedPasses(made) if self.graphed else made
        return self.passes

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "passes": None, "draws": None}  # a copy captures its own
