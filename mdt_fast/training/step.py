"""A training step's passes for custom training loops. B samples, [C, S, S] each."""

from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from ..config import TrainConfig, check_types
from ..cuda_graphs import Numbers
from ..diffusion import GaussianDiffusion
from ..errors import UserError
from ..models.base import Transformer
from ..models.embed import LabelEmbedder
from .objective import Draws, draw
from .parallelize import DTYPES
from .passes import GraphedPasses, Passes


class TrainingStep:
    """MDT's objective, forward and backward: ``step(x, y)`` leaves the gradients in the parameters.

    Both passes (over all tokens, and over the kept ones; DiT has only the first) run as one batch, with
    random draws as in the trainer. On a GPU they run as one CUDA graph per number of kept tokens, captured
    when that number first occurs. Each call overwrites previous gradients (with ``accumulate``, the first
    call of an update does). The next step overwrites a graph's gradients.

    ``model``: a model of this package, on its device and in training mode, compiled by
    :func:`mdt_fast.compile_for_training` or not. ``dtype``: autocast dtype of the passes; a model sharded by
    FSDP computes in its policy's dtype. ``passes``: ``together``, or ``in_turn``, each followed by its own
    backward pass, for less memory. ``accumulate``: number of calls, with equal batch sizes, that share an
    update and its number of kept tokens; gradients are their mean, and the first call resets them.

    ``cuda_graphs``: None uses graphs where possible, on a GPU without shards. A graph sees changed values of
    the weights, and replaced weights; it does not see later changes around the layers (hooks, switches,
    adapters). Raises ``UserError`` for another kind of model, and for settings incompatible with it.
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
            inside = getattr(model, "module", getattr(model, "_orig_mod", None))
            advice = "; two_pass_losses takes wrapped ones" if isinstance(inside, Transformer) else ""
            raise UserError(f"model: got a {type(model).__name__}, expected this package's models{advice}")
        if not isinstance(diffusion, GaussianDiffusion):
            raise UserError(f"diffusion: got a {type(diffusion).__name__}, expected create_diffusion's")
        self.settings = TrainConfig(dtype=dtype, passes=passes, accumulate=accumulate)
        check_types(self.settings)
        if accumulate < 1:
            raise UserError(f"accumulate: got {accumulate}, expected 1 or more")
        if cuda_graphs not in (None, True, False):
            raise UserError(f"cuda_graphs: got {cuda_graphs!r}, expected None, True or False")
        self.model, self.diffusion, self.cuda_graphs = model, diffusion, cuda_graphs
        weight = next(model.parameters())
        if weight.element_size() == 2 and weight.dtype != DTYPES[dtype]:
            raise UserError(f"dtype: {dtype!r}, but the model's weights are {weight.dtype}")
        self.sharded = isinstance(model, FSDPModule)
        if not self.sharded and any(isinstance(block, FSDPModule) for block in model.every_block()):
            raise UserError("model: its blocks are sharded but it is not; call fully_shard(model) last")
        if cuda_graphs and not self._goes(weight.device):
            where = "a model that FSDP shards" if self.sharded else f"a model on {str(weight.device)!r}"
            raise UserError(f"cuda_graphs: needs a CUDA device without shards, got {where}")
        embedder: Any = model.y_embedder
        if model.drops_by_itself and getattr(embedder, "dropout_prob", False):
            name = type(embedder).__name__
            raise UserError(
                f"y_embedder: got a {name}, which drops labels in its own forward; expected one with a "
                "method drop(y) for it"
            )
        self.numbers, self.device = Numbers(model), weight.device
        self.made: Passes | GraphedPasses | None = None
        self.calls = 0
        self.draws: Draws | None = None

    def restart(self) -> None:
        """Start a new update with the next call, even if the previous one is incomplete."""
        self.calls, self.draws = 0, None

    def __call__(
        self, x: Tensor, y: Tensor, t: Tensor | None = None, *, scale: Tensor | float | None = None
    ) -> dict[str, Tensor]:
        """The loss terms [B] of images or latents ``x`` [B, C, S, S] with labels ``y`` [B] (int64; for a
        custom embedder, whatever it takes, [B, ...]), both on the model's device: ``loss``, ``mse``, ``vb``,
        and for the masked pass ``m_loss``, ``m_mse``, ``m_vb``.

        Gradients are those of mean ``loss`` plus mean ``m_loss``, times ``scale`` (one number, for float16).
        ``t`` [B]: timesteps, drawn uniformly if None. Raises ``UserError`` for invalid arguments; if a pass
        fails, the update starts over.
        """
        device = next(self.model.parameters()).device
        if isinstance(scale, int | float):
            # Copying a number to the GPU would wait for it.
            scale = torch.full((), float(scale), dtype=torch.float32, device=device)
        self._check(x, y, scale, device)
        B, parts, part, draws = len(x), self.settings.accumulate, self.calls, self.draws
        if draws is not None and len(draws.t) != parts * B:
            others = len(draws.t) // parts
            raise UserError(
                f"x: batch of {B}, but the other calls of this update have {others}; restart() begins another"
            )
        self.restart()  # in case of an error below
        if draws is None or self.made is None:
            self._make(device)
            draws = draw(self.model, self.diffusion, parts * B, device)  # the same number kept in all calls
        rows = draws.rows(slice(part * B, (part + 1) * B))
        if t is not None:
            self.diffusion.check_timesteps(t, x)
            rows = replace(rows, t=t)
        embedder: Any = self.model.y_embedder
        ours = LabelEmbedder.drop, LabelEmbedder.token_drop
        if not self.model.takes_labels or (type(embedder).drop, type(embedder).token_drop) != ours:
            rows = self._dropped(y, rows)
        assert self.made is not None
        if part == 0:
            self.made.zero_grad()
        terms = self.made(x, y, rows, None if scale is None else scale.reshape(()), part + 1 == parts)
        if part + 1 < parts:
            self.calls, self.draws = part + 1, draws
        return terms

    def _check(self, x: Tensor, y: Tensor, scale: Tensor | None, device: torch.device) -> None:
        model = self.model
        if not model.training or not torch.is_grad_enabled():
            state = "gradients are disabled" if model.training else "in eval mode; call model.train() first"
            raise UserError(f"model: {state}")
        for name, given in (("x", x), ("y", y), *([] if scale is None else [("scale", scale)])):
            if not isinstance(given, Tensor):
                raise UserError(f"{name}: got a {type(given).__name__}, expected a torch.Tensor")
            if given.device != device:
                raise UserError(f"{name}: on {given.device}, but the model is on {device}")
        shape = [model.in_channels, model.input_size, model.input_size]
        if not len(x) or not x.is_floating_point() or list(x.shape[1:]) != shape:
            raise UserError(f"x: {list(x.shape)} {x.dtype}, expected floating-point [B, {str(shape)[1:]}")
        if y.shape[: 1 if not model.takes_labels else None] != x.shape[:1]:
            raise UserError(f"y: shape {list(y.shape)}, expected [{len(x)}] (one per sample of x)")
        if scale is not None and scale.numel() != 1:
            raise UserError(f"scale: shape {list(scale.shape)}, expected one number")
        if y.requires_grad and self.settings.passes == "in_turn":
            raise UserError("y: requires a gradient, which in_turn would need twice; use passes='together'")

    def _dropped(self, y: Tensor, draws: Draws) -> Draws:
        """``draws`` with the conditioning of each pass, after the embedder's own drops."""
        full = self.model.drop_labels(y)
        masked = None if draws.plan is None else self.model.drop_labels(y)
        learnt = full.requires_grad or (masked is not None and masked.requires_grad)
        if learnt and isinstance(self.made, GraphedPasses):
            raise UserError(
                "y: it, or the result of its embedder's drop, requires a gradient, which a CUDA graph does "
                "not propagate; use cuda_graphs=False"
            )
        return replace(draws, given=full, given_masked=masked)

    def _goes(self, device: torch.device) -> bool:
        return device.type == "cuda" and not self.sharded

    def _make(self, device: torch.device) -> None:
        """Make the passes; again after a change of device, or with graphs if weights were replaced, moved,
        frozen or unfrozen."""
        graphed = self._goes(device) if self.cuda_graphs is None else self.cuda_graphs
        moved = graphed and self.numbers.moved()
        if self.made is None or moved or self.device != device:
            self.device = device
            passes = Passes(self.model, self.diffusion, self.settings, self.sharded, device)
            self.made = GraphedPasses(passes) if graphed else passes

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "made": None, "calls": 0, "draws": None}  # a copy captures its own
