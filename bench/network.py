"""Calculate how long a training step takes on many GPUs: ``traffic.py`` over given links.

This is a model, not a measurement. A collective takes the time of its slowest link plus a latency for every
hop, which is how NCCL itself estimates a ring (in its ``src/graph/tuning.cc``). The rest is FSDP2's overlap,
see :func:`step_seconds`. The model assumes that the host stays ahead of the GPU and that a GPU computes no
slower while it communicates.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from mdt_fast.config import ModelConfig
from mdt_fast.errors import UserError
from mdt_fast.models import flops
from traffic import Collective, Layout, Mode, Step, mean_kept, training_step, whole

FORWARD = 1 / 3  # of a step's compute; the backward pass has two products for each one in the forward pass
LARGEST_BATCH = 4096


@dataclass(frozen=True)
class Link:
    """``bandwidth``: bytes/s that a GPU sends while receiving as many. ``latency``: seconds per hop."""

    bandwidth: float
    latency: float


@dataclass(frozen=True)
class Links:
    """The links between the GPUs of a ``node`` and over the ``network``, whose bandwidth is one GPU's share.

    ``call``: seconds that a collective takes before any data moves. Raises ``UserError`` for a bandwidth that
    is not positive or a time that is negative.
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
        """Seconds that one collective takes."""
        ring, (within, between) = collective.ring, collective.sent
        hops, crossing = collective.rounds * (ring.size - 1), collective.rounds * (ring.nodes - 1)
        latency = (hops - crossing) * self.node.latency + crossing * self.network.latency
        return self.call + latency + max(within / self.node.bandwidth, between / self.network.bandwidth)


@dataclass(frozen=True)
class Prediction:
    """A step that takes ``step_s`` seconds, and would take ``compute_s`` on a single GPU."""

    step: Step
    compute_s: float
    step_s: float

    @property
    def exposed_s(self) -> float:
        """Seconds for which the GPU waits for others."""
        return self.step_s - self.compute_s

    @property
    def efficiency(self) -> float:
        """Images/s per GPU, relative to a single GPU."""
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
    """Predict a step that takes ``compute_s`` seconds on one GPU, for as many images per GPU of ``layout``.

    The other arguments are those of ``traffic.training_step``. Raises ``UserError`` if an argument
    makes no sense.
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
    """The least images on each GPU for an efficiency of ``target`` or more; None if more than 4096.

    A GPU is assumed to need ``seconds_per_image`` at every batch size. If it needs more at small ones, they
    hide more of the traffic.
    """
    positive("seconds_per_image", seconds_per_image, "seconds")
    if not 0 < target < 1:
        raise UserError(f"target: got {target!r}, expected a number between 0 and 1")
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
    """Seconds for a step of ``batch`` images on a GPU with ``peak`` FLOP/s, of which it reaches ``mfu``.

    FLOPs are the reference's, forward and backward, as in the benchmark.
    """
    whole("batch", batch)
    positive("peak", peak, "FLOP/s")
    if not 0 < mfu <= 1:
        raise UserError(f"mfu: got {mfu!r}, expected a number above 0, up to 1")
    return flops.train_step(config, mean_kept(config)).flops * batch / (peak * mfu)


class _Queue:
    """A communicator: it runs one collective at a time, in the order of the calls."""

    def __init__(self, links: Links) -> None:
        self.links, self.free = links, 0.0

    def add(self, collectives: Iterable[Collective | None], ready: float) -> float:
        """The time at which these are done, if none starts before ``ready``."""
        for one in collectives:
            if one is not None:
                self.free = max(self.free, ready) + self.links.seconds(one)
        return self.free if any(collectives) else ready


def step_seconds(step: Step, links: Links, compute_s: float) -> float:
    """Seconds of a step whose compute, ``compute_s`` in total, is divided among the blocks by their FLOPs.

    This follows FSDP2. The root is gathered first. In the forward pass at most two blocks are gathered ahead
    of the one being computed; in the backward pass only one, the preceding block. Gradients are scattered
    while preceding blocks are computed, but the next ones to be scattered wait for them. All of this is one
    queue, as it is one NCCL communicator; replicas have another. The step ends with the root's gradients.
    """
    shards, replicas = _Queue(links), _Queue(links)
    unit = compute_s / (step.root.flops + sum(visit.flops for visit in step.visits))

    def reduced(visit_reduces: tuple[Collective, ...], ready: float) -> float:
        """The time at which the gradients are scattered. The sum over replicas follows independently."""
        scattered = shards.add([one for one in visit_reduces if one.kind == "reduce_scatter"], ready)
        replicas.add([one for one in visit_reduces if one.kind == "all_reduce"], scattered)
        return scattered

    now = shards.add([step.root.gather], 0.0)
    before, earlier = now, 0.0  # when the last two blocks started computing
    for visit in step.visits:
        start = max(now, shards.add([visit.gather], earlier))
        before, earlier = start, before
        now = start + FORWARD * visit.flops * unit

    # Nearly all of the root's compute is in its last layer, between the two passes.
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
    """Raise ``UserError`` unless ``value`` is a finite number above 0."""
    if not (isinstance(value, int | float) and 0 < value < math.inf):
        raise UserError(f"{name}: got {value!r}, expected a positive number of {unit}")


def _time(name: str, value: float) -> None:
    if not (isinstance(value, int | float) and 0 <= value < math.inf):
        raise UserError(f"{name}: got {value!r}, expected a number of seconds, 0 or more")
