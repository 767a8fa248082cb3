"""Model passes for a sampler, which knows the times and labels of all steps before the first one.

n images, B rows: n, or 2n with guidance (n with their classes, then n with the null class); U distinct
labels, D width, W modulation values per row (all blocks together).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels import quantize_weight
from ..masking import MaskPlan
from .attention import Attention
from .base import Transformer
from .blocks import Block, FinalLayer, Mlp, both_skips
from .conditioning import Conditioning
from .ops import Float8Linear, in_float8, takes_activated
from .own import is_itself, is_plain, is_watched, is_wrapped, keeps

CHUNK_BYTES = 2**28
"""Memory for the modulations of one chunk of steps."""


GIVEN_CONDITIONING = "condition", "run", "image", "from_tokens", "encode", "decode"
"""The models' methods that make the conditioning or are given it."""


def is_open(model: nn.Module) -> TypeGuard[Transformer]:
    """Whether a sampler may run the model's parts itself, instead of its ``forward``.

    It may not if something wraps the whole forward pass: hooks (including FSDP's), another ``forward`` (a
    subclass's, or one set on the instance, as accelerate does to bring weights to the GPU), or
    ``torch.compile``. Nor may it if modulations are more than SiLU and a linear layer.
    """
    if not isinstance(model, Transformer) or is_wrapped(model) or not keeps(model, "forward"):
        return False
    modulated: list[Any] = [*model.every_block(), model.final_layer]
    own = [getattr(module, "adaLN_modulation", None) for module in modulated]
    return all(each is not None and takes_activated(each) for each in own)


def guided_pass(
    model: Transformer,
    x: Tensor,
    c: Conditioning,
    plan: MaskPlan | None = None,
    *,
    guided: bool,
    shared: bool,
) -> Tensor:
    """The model's output [B, O, S, S] for images x [n, C, S, S]; ``c`` has all B rows.

    ``plan``: which tokens of the n images the encoder sees (None: all). ``guided``: B is 2n. ``shared``: both
    halves have the same patches, which are embedded once.
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
    """The weights of the blocks' linear layers, cast from float32 to autocast's ``dtype``; for float8 layers
    they are rounded to float8 instead.

    :meth:`refresh` casts the weights once. The layers hold the cast weights only :meth:`within` a pass.
    """

    def __init__(self, model: Transformer, dtype: torch.dtype):
        self.model, self.dtype = model, dtype
        self.layers: list[nn.Linear] = []
        self.whole: list[nn.Parameter] = []
        self.cast: list[Cast] = []

    @torch.no_grad()
    def refresh(self) -> bool:
        """Cast the current weights. Returns whether the cast weights are now in other memory than before."""
        layers = [layer for block in _blocks_of_steps(self.model) for layer in _layers_of_steps(block)]
        whole: list[Any] = [layer.weight for layer in layers]
        same = [(id(m), m.weight.shape, m.weight.device, _parts(m)) for m in layers] == [
            (id(m), cast[0].shape, cast[0].device, len(cast))
            for m, cast in zip(self.layers, self.cast, strict=True)
        ]
        if not same:
            with torch.inference_mode(False):  # they outlive an inference mode that may be active here
                self.cast = [self._empty(layer) for layer in layers]
        self.layers, self.whole = layers, whole
        plain = [(cast[0], own) for cast, own in zip(self.cast, whole, strict=True) if len(cast) == 1]
        if plain:
            torch._foreach_copy_([to for to, _ in plain], [own for _, own in plain])
        for cast, own in zip(self.cast, whole, strict=True):
            if len(cast) == 2:
                rows, _, scale = quantize_weight(own, columns=False)
                cast[0].copy_(rows)
                cast[1].copy_(scale)
        return not same

    def _empty(self, layer: nn.Linear) -> "Cast":
        if _parts(layer) == 1:
            return (nn.Parameter(torch.empty_like(layer.weight, dtype=self.dtype), requires_grad=False),)
        rows = torch.empty_like(layer.weight, dtype=torch.float8_e4m3fn)
        return rows, torch.empty(len(rows), dtype=torch.float32, device=rows.device)

    @contextmanager
    def within(self) -> Iterator[None]:
        """Put the cast weights into the layers, except those whose weight was replaced since the cast."""
        here = list(zip(self.layers, self.whole, self.cast, strict=True))
        for layer, before, after in here:
            if layer._parameters["weight"] is before:
                if len(after) == 1:
                    layer._parameters["weight"] = after[0]
                elif isinstance(layer, Float8Linear):
                    layer.rounded = after
        try:
            yield
        finally:
            for layer, before, after in here:
                if isinstance(layer, Float8Linear):
                    layer.rounded = None
                if layer._parameters["weight"] is after[0]:
                    layer._parameters["weight"] = before


Cast = tuple[nn.Parameter] | tuple[Tensor, Tensor]
"""One layer's cast weight: in another dtype, or as float8 rows and their scales."""


def _parts(layer: nn.Linear) -> int:
    return 1 if in_float8(layer) is False else 2


def _blocks_of_steps(model: Transformer) -> Iterator[Block]:
    """The blocks, without those used in masked passes only."""
    aside = {id(block) for block in getattr(model, "sideblocks", ())}
    return (block for block in model.every_block() if id(block) not in aside)


def _layers_of_steps(block: Block) -> Iterator[nn.Linear]:
    """The layers whose weights (float32, or to be rounded to float8) are read only by a step's products.
    Modulation layers are not among them: they can be computed for many steps at once."""
    modules: tuple[nn.Module, ...] = block, block.attn, block.mlp
    if not all(map(is_itself, modules, (Block, Attention, Mlp))):
        return
    for layer in (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2, block.skip_linear):
        if layer is None or not is_plain(layer):
            continue
        wide = layer.weight.dtype == torch.float32 or _parts(layer) == 2
        if type(layer.weight) is nn.Parameter and wide:
            yield layer


def conditions_plainly(model: Transformer) -> bool:
    """Whether blocks and embedders may be run with the modulations of all steps at once: nothing of the
    user's sees the conditioning, or would see other rows than in a call of the whole model."""
    if not keeps(model, *GIVEN_CONDITIONING):
        return False
    # Lists of blocks: a module of another kind among them is given the conditioning, too.
    lists = (child for child in model.children() if isinstance(child, nn.ModuleList))
    listed = [parts for parts in lists if any(isinstance(part, Block) for part in parts)]
    aside = getattr(model, "sideblocks", None)
    blocks = [*_blocks_of_steps(model), *chain(*(blocks for blocks in listed if blocks is not aside))]
    last = model.final_layer
    if not is_itself(last, FinalLayer) or not all(is_itself(block, Block) for block in blocks):
        return False
    modulated: list[Any] = [*blocks, last]
    given = model.t_embedder, model.y_embedder, *(part.adaLN_modulation for part in modulated)
    return not any(map(is_watched, chain(*(part.modules() for part in given))))


def may_share_patches(model: Transformer) -> bool:
    """Whether both halves of a guided batch may share their embedded patches: no hook counts the rows."""
    return keeps(model, "embed") and not any(map(is_watched, model.x_embedder.modules()))


class StepModulations:
    """The modulations of all blocks and of the last layer, computed for a chunk of steps at a time.

    Each layer does one product per chunk, with a row for each step and each distinct label. The layers'
    weights, a third of the model's, are thus read once per chunk, and the null class costs one row per step.
    ``times``: the original timestep at each step index. Steps are requested from the last index down.
    """

    def __init__(
        self, model: Transformer, times: Sequence[float], labels: Tensor, chunk_bytes: int = CHUNK_BYTES
    ):
        D, parts = model.hidden_size, list[Any]([*_blocks_of_steps(model), model.final_layer])
        # One of another width belongs to something that is attached to the model.
        self.blocks = [part for part in parts if getattr(part.adaLN_modulation[1], "in_features", D) == D]
        self.layers: list[Any] = [block.adaLN_modulation[1] for block in self.blocks]
        self.widths = [2 * D if block is model.final_layer else 6 * D for block in self.blocks]
        self.model, self.labels = model, labels
        self.times = torch.tensor(times, device=labels.device)
        weight = next(model.parameters())
        row = len(labels) * sum(self.widths) * weight.element_size()
        self.chunk = max(1, min(len(times), chunk_bytes // row))
        self.first, self.values = len(times), weight.new_empty(0)

    def __call__(self, index: int, rows: Tensor) -> Tensor:
        """The modulations [B, W] of step ``index``; row i is for ``labels[rows[i]]``."""
        if not self.first <= index < self.first + len(self.values):
            self._compute(max(0, index + 1 - self.chunk), index + 1)
        return self.values[index - self.first].index_select(0, rows)

    def conditioning(self, modulations: Tensor) -> Conditioning:
        """Modulations [B, W], as the blocks take them."""
        parts = modulations.split(self.widths, dim=1)
        nothing = modulations[:, :0]
        return Conditioning(nothing, nothing, dict(zip(self.blocks, parts, strict=True)))

    def _compute(self, first: int, end: int) -> None:
        self.values = self.values.new_empty(0)  # free it before the next chunk needs the memory
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
