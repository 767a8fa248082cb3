"""Calculate what the GPUs of a run send each other in one training step, collective by collective.

The buffers are those that FSDP2 makes from a model wrapped by ``parallelize``, including padding;
``tests/bench/test_bench_network.py`` compares them with what real processes pass to their collectives. They
move in a ring: each of n processes sends and receives (n - 1) / n of what is gathered or scattered, and twice
that of what is all-reduced. The gradient norm, one number of 8 bytes per step, is not listed.

L: tokens, D: width.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, get_args

import torch
from torch.utils.flop_counter import FlopCounterMode

from mdt_fast.config import RATIO_RANGE, ModelConfig
from mdt_fast.errors import UserError, nearest
from mdt_fast.masking import MaskPlan
from mdt_fast.models import flops
from mdt_fast.models.blocks import Block
from mdt_fast.training.parallelize import DTYPES, sharded_dim

Mode = Literal["fsdp", "hybrid", "ddp"]
Kind = Literal["all_gather", "reduce_scatter", "all_reduce"]
MODES: tuple[Mode, ...] = get_args(Mode)
ROOT = "the rest"
REDUCED = torch.float32.itemsize  # gradients are reduced in float32, whatever dtype is gathered


@dataclass(frozen=True)
class Layout:
    """``gpus`` in total, ``gpus_per_node`` per machine. Raises ``UserError`` if they need several machines
    but do not fill them evenly."""

    gpus: int
    gpus_per_node: int = 8

    def __post_init__(self) -> None:
        whole("gpus", self.gpus)
        whole("gpus_per_node", self.gpus_per_node)
        if self.gpus > self.gpus_per_node and self.gpus % self.gpus_per_node:
            near = max(1, round(self.gpus / self.gpus_per_node)) * self.gpus_per_node
            raise UserError(
                f"gpus: {self.gpus} is not divisible by gpus_per_node {self.gpus_per_node}; the nearest that "
                f"is: {near}"
            )

    @property
    def on_node(self) -> int:
        """The run's GPUs on each machine."""
        return min(self.gpus, self.gpus_per_node)

    @property
    def nodes(self) -> int:
        return self.gpus // self.on_node


@dataclass(frozen=True)
class Ring:
    """``size`` processes, with ``on_node`` on each machine in use."""

    size: int
    on_node: int

    @property
    def nodes(self) -> int:
        return self.size // self.on_node


@dataclass(frozen=True)
class Collective:
    """One collective. ``bytes`` is the size of the whole buffer, which all have after a gather or each has
    before a reduction; ``weights`` says whose it is."""

    kind: Kind
    weights: str
    bytes: int
    ring: Ring

    @property
    def rounds(self) -> int:
        """How many times the data goes round the ring."""
        return 2 if self.kind == "all_reduce" else 1

    @property
    def sent(self) -> tuple[float, float]:
        """Bytes that each GPU sends within its machine and over the network; it receives the same amounts.

        A ring enters and leaves a machine once. There is a ring for each GPU of a machine, carrying part of
        the data, so that all GPUs use the same share of the network.
        """
        size, on_node = self.ring.size, self.ring.on_node
        total = self.rounds * self.bytes * (size - 1) / size
        return (total, 0.0) if self.ring.nodes == 1 else (total * (on_node - 1) / on_node, total / on_node)


@dataclass(frozen=True)
class Visit:
    """A call of a block (or of the model around the blocks): the ``flops`` of its forward pass for one image,
    what is gathered before it and again before its backward pass, and what is reduced after that."""

    weights: str
    flops: int
    gather: Collective | None = None
    reduce: tuple[Collective, ...] = ()


@dataclass(frozen=True)
class Step:
    """A training step: the calls of blocks in the order of the forward pass, and the ``root`` around them.

    The ``root`` is gathered once, because FSDP2 keeps it from the forward to the backward pass.
    """

    root: Visit
    visits: tuple[Visit, ...]

    @property
    def collectives(self) -> list[Collective]:
        calls = [visit.gather for visit in (self.root, *self.visits, *reversed(self.visits))]
        reduced = [one for visit in (*reversed(self.visits), self.root) for one in visit.reduce]
        return [one for one in calls if one is not None] + reduced

    @property
    def sent(self) -> tuple[float, float]:
        """Bytes that each GPU sends in a step, within its machine and over the network."""
        within, between = zip(*(one.sent for one in self.collectives), strict=True)
        return sum(within), sum(between)


def training_step(
    config: ModelConfig, layout: Layout, mode: Mode = "fsdp", dtype: str = "bfloat16", packed: bool = True
) -> Step:
    """The traffic of a step of the model of ``config``, whose weights are gathered in ``dtype``.

    With ``packed`` False, the two passes run one after the other and each gathers every block it calls;
    gradients are reduced once, after the last of them. With ``ddp``, no weight is sharded and gradients are
    all-reduced whole. Raises ``UserError`` for an unknown mode or dtype.
    """
    check_mode(mode)
    if dtype not in DTYPES:
        raise UserError(f"dtype: got {dtype!r}{nearest(dtype, DTYPES)}, expected {', '.join(DTYPES)}")
    weights, calls = _weights(config), _calls(config)
    order = calls.packed if packed or mode == "ddp" else (*calls.full, *calls.masked)
    seen: set[str] = set()
    visits = []
    for name, count in order:
        last = name not in seen  # in the backward pass, which runs in reverse
        seen.add(name)
        visits.append(_visit(name, count, weights[name], layout, mode, DTYPES[dtype].itemsize, last))
    return Step(_visit(ROOT, calls.root, weights[ROOT], layout, mode, DTYPES[dtype].itemsize), tuple(visits))


def check_mode(mode: str) -> None:
    if mode not in MODES:
        raise UserError(f"mode: got {mode!r}{nearest(mode, MODES)}, expected {', '.join(MODES)}")


def whole(name: str, value: Any) -> None:
    """Raise ``UserError`` unless ``value`` is an integer, 1 or more."""
    if type(value) is not int or value < 1:
        raise UserError(f"{name}: got {value!r}, expected an integer, 1 or more")


Shape = tuple[tuple[int, ...], bool]
"""A parameter's shape, and whether it is trained."""


def _visit(
    name: str, count: int, shapes: Sequence[Shape], layout: Layout, mode: Mode, size: int, last: bool = True
) -> Visit:
    everywhere = Ring(layout.gpus, layout.on_node)
    shards, replicas = everywhere, None
    if mode == "hybrid":
        shards, replicas = Ring(layout.on_node, layout.on_node), Ring(layout.nodes, 1)
    trained = [shape for shape, learns in shapes if learns]
    if mode == "ddp":
        total = sum(map(math.prod, trained)) * REDUCED
        return Visit(name, count, None, (Collective("all_reduce", name, total, everywhere),))
    gather, reduce = None, []
    if shards.size > 1:
        gathered = sum(padded(shape, shards.size) for shape, _ in shapes)
        gather = Collective("all_gather", name, gathered * size, shards)
    total = sum(padded(shape, shards.size) for shape in trained) * REDUCED
    if shards.size > 1:
        reduce.append(Collective("reduce_scatter", name, total, shards))
    if replicas is not None:  # FSDP2 calls it even for a single replica, where it sends nothing
        reduce.append(Collective("all_reduce", name, total // shards.size, replicas))
    return Visit(name, count, gather, tuple(reduce) if last else ())


def padded(shape: Sequence[int], shards: int) -> int:
    """How many numbers are sent for a parameter cut into ``shards`` equal parts, including padding."""
    dim = sharded_dim(shape, shards)
    return math.prod(shape) // shape[dim] * math.ceil(shape[dim] / shards) * shards


@cache
def _weights(config: ModelConfig) -> dict[str, tuple[Shape, ...]]:
    """The parameters of each block, and those of the model around the blocks."""
    model = flops.meta_model(config, "fast")
    blocks = {name: block for name, block in model.named_modules() if isinstance(block, Block)}
    found = {name: _shapes(block.named_parameters()) for name, block in blocks.items()}
    rest = [
        (name, p)
        for name, p in model.named_parameters()
        if not name.startswith(tuple(f"{b}." for b in blocks))
    ]
    return {**found, ROOT: _shapes(rest)}


def _shapes(parameters: Any) -> tuple[Shape, ...]:
    return tuple((tuple(p.shape), p.requires_grad) for _, p in parameters)


@dataclass(frozen=True)
class _Calls:
    """FLOPs of the forward passes for one image: by block, in the order of the calls in each pass and in both
    passes together, and of the rest."""

    full: tuple[tuple[str, int], ...]
    masked: tuple[tuple[str, int], ...]
    packed: tuple[tuple[str, int], ...]
    root: int


@cache
def _calls(config: ModelConfig) -> _Calls:
    full, root = _pass(config, None)
    kept = mean_kept(config)
    if kept is None:
        return _Calls(tuple(full.items()), (), tuple(full.items()), root)
    masked, more = _pass(config, kept)
    both = tuple((name, count + full.get(name, 0)) for name, count in masked.items())
    return _Calls(tuple(full.items()), tuple(masked.items()), both, root + more)


def mean_kept(config: ModelConfig) -> int | None:
    """Kept tokens of a masked pass at the mean of the ratios drawn; None if there is no masked pass."""
    if config.family == "dit" or config.mask_ratio is None:
        return None
    width = RATIO_RANGE if config.family == "mdtv2" else 0.0
    return int(config.grid_size**2 * (1 - config.mask_ratio - width / 2))


def _pass(config: ModelConfig, len_keep: int | None) -> tuple[dict[str, int], int]:
    """FLOPs of the blocks that a pass calls, in this order, and of the rest. They are the reference's, as in
    the benchmark."""
    model: Any = flops.meta_model(config)
    names = _weights(config).keys() - {ROOT}
    called: list[str] = []
    hooks = [
        block.register_forward_pre_hook(lambda *_, name=name: called.append(name))
        for name, block in model.named_modules()
        if name in names
    ]
    try:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            inputs = flops.inputs(config)
            if len_keep is None:
                model(*inputs)
            else:
                noise = torch.rand(1, config.grid_size**2, device="meta")
                model(*inputs, enable_mask=True, mask_plan=MaskPlan.from_noise(noise, len_keep))
    finally:
        for hook in hooks:
            hook.remove()
    counts = counter.get_flop_counts()
    found = {name: sum(counts[f"{type(model).__name__}.{name}"].values()) for name in called}
    return found, counter.get_total_flops() - sum(found.values())
