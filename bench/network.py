"""How long a training step takes on many GPUs, by arithmetic: ``traffic.py`` over given links.

A model, not a measurement. A collective takes the time of its slowest link, and a latency for every hop; so
NCCL itself estimates a ring (its ``src/graph/tuning.cc``). The rest is FSDP2's overlap, see
:func:`step_seconds`. The host is taken to be ahead of the GPU, and a GPU to compute no slower while it
communicates.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from mdt_fast.config import ModelConfig
from mdt_fast.errors import UserError
from mdt_fast.models import flops
from traffic import Collective, Layout, Mode, Step, mean_kept, training_step, whole

FORWARD = 1 / 3  # of a step's compute; the backward pass has two products for each of the forward pass's
LARGEST_BATCH = 4096


@dataclass(frozen=True)
class Link:
    """``bandwidth``: bytes/s that a GPU sends while it receives as many. ``latency``: seconds of a hop."""

    bandwidth: float
    latency: float


@dataclass(frozen=True)
class Links:
    """Between the GPUs of a ``node``, and over the ``network``, whose bandwidth is the share of one GPU.

    ``call``: seconds that a collective takes before anything moves. ``UserError`` for a bandwidth that is not
    positive, or a negative time.
    """

    node: Link
    network: Link
    call: float = 0.0

    def __post_init__(self) -> None:
        for name, link in (("node", self.node), ("network", self.network)):
            positive(f"{name}.bandwidth", link.bandwidth, "bytes per second")
            _time(f"{name}.latency", link.latency)
        _time("call", self.call)

    def seconds(self, collective: Collective) -> float:
        """How long one collective takes."""
        ring, (within, between) = collective.ring, collective.sent
        hops, crossing = collective.rounds * (ring.size - 1), collective.rounds * (ring.nodes - 1)
        latency = (hops - crossing) * self.node.latency + crossing * self.network.latency
        return self.call + latency + max(within / self.node.bandwidth, between / self.network.bandwidth)


@dataclass(frozen=True)
class Prediction:
    """A step of ``step_s`` seconds, ``compute_s`` of which it would take on one GPU alone."""

    step: Step
    compute_s: float
    step_s: float

    @property
    def exposed_s(self) -> float:
        """Seconds in which the GPU waits for others."""
        return self.step_s - self.compute_s

    @property
    def efficiency(self) -> float:
        """Images/s of a GPU, over those of one that is alone."""
        return self.compute_s / self.step_s


def predict(
    config: ModelConfig,
    layout: Layout,
    links: Links,
    compute_s: float,
    *,
    mode: Mode = "fsdp",
    dtype: str = "bfloat16",
    packed: bool = True,
) -> Prediction:
    """The step that takes ``compute_s`` seconds on one GPU, with as many images on each of ``layout``'s.

    The other arguments are those of :func:`~.traffic.training_step`. Raises ``UserError`` for what does not
    make sense.
    """
    positive("compute_s", compute_s, "seconds")
    step = training_step(config, layout, mode, dtype, packed)
    return Prediction(step, compute_s, step_seconds(step, links, compute_s))


def smallest_batch(
    config: ModelConfig,
    layout: Layout,
    links: Links,
    seconds_per_image: float,
    *,
    target: float = 0.9,
    mode: Mode = "fsdp",
    dtype: str = "bfloat16",
    packed: bool = True,
) -> int | None:
    """Images on each GPU from which on the efficiency is ``target`` or more; None: more than 4096.

    A GPU is taken to need ``seconds_per_image`` at every batch: where it needs more at small ones, they hide
    more of the traffic.
    """
    positive("seconds_per_image", seconds_per_image, "seconds")
    if not 0 < target < 1:
        raise UserError(f"target: got {target!r}, allowed is a number between 0 and 1")
    step = training_step(config, layout, mode, dtype, packed)

    def scales(batch: int) -> bool:
        compute_s = batch * seconds_per_image
        return compute_s >= target * step_seconds(step, links, compute_s)

    low, high = 0, LARGEST_BATCH  # low does not scale, high does
    if not scales(high):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if scales(middle) else (middle, high)
    return high


def compute_seconds(config: ModelConfig, batch: int, peak: float, mfu: float) -> float:
    """Seconds of a step of ``batch`` images on a GPU of ``peak`` FLOP/s that reaches the share ``mfu`` of it.

    FLOPs are the reference's, forward and backward, as in the bench.
    """
    whole("batch", batch)
    positive("peak", peak, "FLOP/s")
    if not 0 < mfu <= 1:
        raise UserError(f"mfu: got {mfu!r}, allowed is a number above 0, up to 1")
    return flops.train_step(config, mean_kept(config)).flops * batch / (peak * mfu)


class _Queue:
    """A communicator: one collective at a time, in the order they are called in."""

    def __init__(self, links: Links) -> None:
        self.links, self.free = links, 0.0

    def add(self, collectives: Iterable[Collective | None], ready: float) -> float:
        """When these are done, of which none starts before ``ready``."""
        for one in collectives:
            if one is not None:
                self.free = max(self.free, ready) + self.links.seconds(one)
        return self.free if any(collectives) else ready


def step_seconds(step: Step, links: Links, compute_s: float) -> float:
    """Seconds of a step whose compute, ``compute_s`` in all, is shared out among the blocks by their FLOPs.

    As FSDP2 does it: the root is gathered first. In the forward pass at most two blocks are gathered ahead of
    the one that computes; in the backward pass one, the one before it. Gradients are scattered while the
    blocks before are computed, but the next to be scattered waits for them. All that is one queue, as
    it is one NCCL communicator; replicas have another. The step ends with the root's gradients.
    """
    shards, replicas = _Queue(links), _Queue(links)
    unit = compute_s / (step.root.flops + sum(visit.flops for visit in step.visits))

    def reduced(visit_reduces: tuple[Collective, ...], ready: float) -> float:
        """When the gradients are scattered; the sum over replicas follows on its own."""
        scattered = shards.add([one for one in visit_reduces if one.kind == "reduce_scatter"], ready)
        replicas.add([one for one in visit_reduces if one.kind == "all_reduce"], scattered)
        return scattered

    now = shards.add([step.root.gather], 0.0)
    before, earlier = now, 0.0  # when the last two began to compute
    for visit in step.visits:
        start = max(now, shards.add([visit.gather], earlier))
        before, earlier = start, before
        now = start + FORWARD * visit.flops * unit

    # The root's compute is nearly all in its last layer, between the two passes.
    gathered = shards.add([step.visits[-1].gather], now)
    now += step.root.flops * unit
    scattered = 0.0
    for index in reversed(range(len(step.visits))):
        visit = step.visits[index]
        start = max(now, gathered)
        if index:
            gathered = shards.add([step.visits[index - 1].gather], start)
        now = max(start + (1 - FORWARD) * visit.flops * unit, scattered)
        if visit.reduce:
            scattered = reduced(visit.reduce, now)
    reduced(step.root.reduce, now)
    return max(now, shards.free, replicas.free)


def positive(name: str, value: float, unit: str) -> None:
    """``UserError`` unless ``value`` is a finite number above 0."""
    if not (isinstance(value, int | float) and 0 < value < math.inf):
        raise UserError(f"{name}: got {value!r}, allowed is a positive number of {unit}")


def _time(name: str, value: float) -> None:
    if not (isinstance(value, int | float) and 0 <= value < math.inf):
        raise UserError(f"{name}: got {value!r}, allowed is a number of seconds, 0 or more")
