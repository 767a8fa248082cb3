"""A training step's passes for a loop of one's own. B samples, [C, S, S] each."""

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

    Both passes (over all tokens, and over kept ones; DiT has the first alone) run as one batch, with what is
    random drawn as the trainer draws it. On a GPU they are one CUDA graph for each number of kept tokens,
    captured when that is first met. Gradients are the call's alone: what was in them before is gone. A
    graph's are written over by the next step.

    ``model``: one of this package, on its device and in training mode, compiled by
    :func:`mdt_fast.compile_for_training` or not. ``dtype``: what passes compute in, by autocast; a model that
    FSDP shards computes in its policy's. ``passes``: ``together``, or ``in_turn``, each with its own backward
    pass, for less memory. ``accumulate``: so many calls, of equal batches, share an update, whose gradients
    are their mean, and the number of kept tokens; the first of them begins anew.

    ``cuda_graphs``: None where they go, on a GPU without shards. A graph sees new numbers in the weights, and
    weights that are others now; it does not see what is changed around the layers after its capture (hooks,
    switches, adapters). Raises ``UserError`` for another model, and for settings that do not go with it.
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
            advice = "; two_pass_losses takes what wraps one" if isinstance(inside, Transformer) else ""
            raise UserError(f"model: got a {type(model).__name__}, allowed are this package's models{advice}")
        if not isinstance(diffusion, GaussianDiffusion):
            raise UserError(f"diffusion: got a {type(diffusion).__name__}, expected create_diffusion's")
        self.settings = TrainConfig(dtype=dtype, passes=passes, accumulate=accumulate)
        check_types(self.settings)
        if accumulate < 1:
            raise UserError(f"accumulate: must be at least 1, got {accumulate}")
        if cuda_graphs not in (None, True, False):
            raise UserError(f"cuda_graphs: got {cuda_graphs!r}, allowed are None, True and False")
        self.model, self.diffusion, self.cuda_graphs = model, diffusion, cuda_graphs
        weight = next(model.parameters())
        if weight.element_size() == 2 and weight.dtype != DTYPES[dtype]:
            raise UserError(f"dtype: {dtype!r}, but the model's weights are {weight.dtype}")
        self.sharded = isinstance(model, FSDPModule)
        if not self.sharded and any(isinstance(block, FSDPModule) for block in model.every_block()):
            raise UserError("model: its blocks are sharded and it is not; fully_shard(model) comes last")
        if cuda_graphs and not self._goes(weight.device):
            where = "a model that FSDP shards" if self.sharded else f"a model on {str(weight.device)!r}"
            raise UserError(f"cuda_graphs: for a CUDA device without shards, got {where}")
        embedder: Any = model.y_embedder
        drops = model.takes_labels or hasattr(embedder, "drop")
        if not drops and getattr(embedder, "dropout_prob", False):
            name = type(embedder).__name__
            raise UserError(f"model: its y_embedder, a {name}, has a dropout_prob and no method drop(y)")
        self.numbers, self.device = Numbers(model), weight.device
        self.made: Passes | GraphedPasses | None = None
        self.calls = 0
        self.draws: Draws | None = None

    def restart(self) -> None:
        """The next call begins an update, whatever has been called of the one before."""
        self.calls, self.draws = 0, None

    def __call__(
        self, x: Tensor, y: Tensor, t: Tensor | None = None, *, scale: Tensor | float | None = None
    ) -> dict[str, Tensor]:
        """The loss terms [B] of images or latents ``x`` [B, C, S, S] with labels ``y`` [B] (int64; what an
        embedder of one's own takes, [B, ...]), both on the model's device: ``loss``, ``mse``, ``vb``, and of
        the masked pass ``m_loss``, ``m_mse``, ``m_vb``.

        Gradients are those of the mean ``loss`` and the mean ``m_loss`` together, times ``scale`` (float16's,
        one number). ``t`` [B]: timesteps, drawn evenly if None. Raises ``UserError`` for what does not fit;
        an update in which a pass fails begins anew.
        """
        device = next(self.model.parameters()).device
        if isinstance(scale, int | float):
            scale = torch.full((), float(scale), device=device)  # a copy would wait for the GPU
        self._check(x, y, scale, device)
        B, parts, part, draws = len(x), self.settings.accumulate, self.calls, self.draws
        if draws is not None and len(draws.t) != parts * B:
            others = len(draws.t) // parts
            raise UserError(
                f"x: batch of {B}, the other parts of this update have {others}; restart() begins another"
            )
        self.restart()  # of what ends in an error
        if draws is None or self.made is None:
            self._make(device)
            draws = draw(self.model, self.diffusion, parts * B, device)  # as many kept in all parts
        rows = draws.rows(slice(part * B, (part + 1) * B))
        if t is not None:
            self.diffusion.check_timesteps(t, x)
            rows = replace(rows, t=t)
        embedder: Any = self.model.y_embedder
        if not self.model.takes_labels or type(embedder).drop is not LabelEmbedder.drop:
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
            state = "gradients are off here" if model.training else "in eval mode; model.train() comes first"
            raise UserError(f"model: {state}")
        for name, given in (("x", x), ("y", y), *([] if scale is None else [("scale", scale)])):
            if not isinstance(given, Tensor):
                raise UserError(f"{name}: got a {type(given).__name__}, expected a torch.Tensor")
            if given.device != device:
                raise UserError(f"{name}: on {given.device}, the model is on {device}")
        shape = [model.in_channels, model.input_size, model.input_size]
        if not len(x) or not x.is_floating_point() or list(x.shape[1:]) != shape:
            raise UserError(f"x: {list(x.shape)} {x.dtype}, expected floating-point [B, {str(shape)[1:]}")
        if y.shape[: 1 if not model.takes_labels else None] != x.shape[:1]:
            raise UserError(f"y: shape {list(y.shape)}, expected [{len(x)}] (one per sample of x)")
        if scale is not None and scale.numel() != 1:
            raise UserError(f"scale: shape {list(scale.shape)}, expected one number")
        if y.requires_grad and self.settings.passes == "in_turn":
            raise UserError("y: requires a gradient, which passes in turn ask for twice; take 'together'")

    def _dropped(self, y: Tensor, draws: Draws) -> Draws:
        """What each pass is given, with the embedder's own drops."""
        full = self.model.drop_labels(y)
        masked = None if draws.plan is None else self.model.drop_labels(y)
        learnt = full.requires_grad or (masked is not None and masked.requires_grad)
        if learnt and isinstance(self.made, GraphedPasses):
            raise UserError(
                "y: it, or what its embedder's drop gives, requires a gradient, which a CUDA graph does not "
                "hand on; take cuda_graphs=False"
            )
        return replace(draws, given=full, given_masked=masked)

    def _goes(self, device: torch.device) -> bool:
        return device.type == "cuda" and not self.sharded

    def _make(self, device: torch.device) -> None:
        """Passes, anew on another device, and where graphs would read other weights, or some are frozen."""
        graphed = self._goes(device) if self.cuda_graphs is None else self.cuda_graphs
        moved = graphed and self.numbers.moved()
        if self.made is None or moved or self.device != device:
            self.device = device
            passes = Passes(self.model, self.diffusion, self.settings, self.sharded, device)
            self.made = GraphedPasses(passes) if graphed else passes

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "made": None, "calls": 0, "draws": None}  # a copy captures its own
