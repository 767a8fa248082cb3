"""Measure time, the matmul peak, copies and peak memory.

Time is wall time between two synchronisations; single ops have their own clocks (:func:`op_clock`). Providers
are timed in interleaved rounds, so that a drift of the clock or of the machine's load affects all of them
alike. A matmul is timed among them, and its best rate in the run is the peak they are compared with.

Memory is the most that torch's allocator held during one step, minus what it held before, plus the provider's
own weights, optimiser state and moving average. On a GPU this is ``max_memory_allocated``. On a CPU the
allocations and releases of one step, recorded by torch's profiler, are added up in order. Unlike the resident
set size, this does not depend on what the process held before; it leaves out scratch space that oneDNN and
MKL allocate themselves.
"""

import contextlib
import gc
import os
import random
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor, nn

Spread = tuple[float, float, float]
"""The 20th, 50th and 80th percentile."""

MIN_ROUNDS = 5
"""Rounds needed for a ratio; the median of fewer is down to chance."""

PROBE_SECONDS = 1.5
"""Time for finding the size and rate of :class:`Matmul`; long enough for quiet moments of a busy machine."""

MAX_BURSTS = 1000
"""More than any current device fits into that time, so that the time ends the probe and not this limit."""


FLUSH_BYTES, FLUSHES = 2**28, 4
"""A buffer several times the L2 of current GPUs; all the flushes take half a millisecond on an A100."""


def spread(values: list[float]) -> Spread:
    """The interpolated 20th, 50th and 80th percentile of one or more values."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    cuts = statistics.quantiles(values, n=10, method="inclusive")
    return cuts[1], cuts[4], cuts[7]


def rates(amount: float, times: Spread) -> Spread:
    """The spread of ``amount`` per unit of time; the high end of ``times`` gives the low end."""
    low, middle, high = times
    return amount / high, amount / middle, amount / low


def ratios(reference: Sequence[float], seconds: Sequence[float]) -> Spread:
    """The spread of the speed-up over the reference, with each round compared to the reference's same round.

    A ratio of the two medians would compare different moments, at which the machine's load may differ.
    """
    return spread([a / b for a, b in zip(reference, seconds, strict=True)])


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class WallClock:
    """Wall time of a call, between two synchronisations."""

    late = False

    def __init__(self, device: torch.device):
        self.device = device

    def __call__(self, call: Callable[[], object]) -> float:
        synchronize(self.device)
        start = time.perf_counter()
        call()
        synchronize(self.device)
        return time.perf_counter() - start


class ColdClock:
    """Time of a call on the current GPU with a cold L2, measured by events.

    The L2 is flushed by filling a buffer. This also gives the host a head start of some tenths of a
    millisecond, without which short kernels would be timed at the speed at which Python launches them.
    ``late`` says that the last call may still have been limited by its launches: the GPU had started before
    everything was launched, and took less time than the launching.
    """

    late = False

    def __init__(self, device: torch.device):
        self.buffer = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)

    def __call__(self, call: Callable[[], object]) -> float:
        for _ in range(FLUSHES):
            self.buffer.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        launching = time.perf_counter()
        start.record()
        call()
        begun = start.query()
        end.record()
        launching = time.perf_counter() - launching
        end.synchronize()
        seconds = start.elapsed_time(end) / 1e3
        self.late = begun and seconds < launching
        return seconds


class WarmClock(WallClock):
    """Wall time of the second of two calls, so that it does not matter which provider ran before."""

    def __call__(self, call: Callable[[], object]) -> float:
        call()
        return super().__call__(call)


Clock = WallClock | ColdClock


def op_clock(device: torch.device) -> Clock:
    """The clock for single ops. CPU caches stay warm, as flushing them would slow Python more than the op."""
    return ColdClock(device) if device.type == "cuda" else WarmClock(device)


@dataclass
class Timing:
    """The result of :func:`take_turns` for one participant: seconds and indices of its steps, or its error.
    ``late`` counts how often the clock reported that the host was too slow."""

    seconds: list[float] = field(default_factory=list)
    indices: list[int] = field(default_factory=list)
    error: Exception | None = None
    late: int = 0


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during :func:`take_turns`, with the ``timings`` of the rounds that were complete."""

    def __init__(self, timings: dict[str, Timing], rounds: int):
        super().__init__()
        self.timings = {
            name: replace(one, seconds=one.seconds[:rounds], indices=one.indices[:rounds])
            for name, one in timings.items()
        }


def take_turns(
    steps: dict[str, Callable[[int], object]],
    device: torch.device,
    *,
    repeats: int,
    inner: int = 1,
    deadline: float = float("inf"),
    least: int = 1,
    clock: Clock | None = None,
    shuffle: bool = False,
    again: Mapping[str, int] | None = None,
) -> dict[str, Timing]:
    """Time ``steps`` in interleaved rounds; round r calls each one with ``inner`` indices from r*inner on.

    ``again`` gives the steps that are called several times in a row with each index, and how often.

    ``shuffle`` changes the order from round to round, because for short steps it matters what ran before.

    ``seconds`` are per step. A round that has started is finished, so that all have the same number of
    samples. No round starts after ``deadline`` (``time.monotonic``), except for the first ``least``. A step
    that raises drops out. Ctrl-C raises :class:`Interrupted`.
    """
    clock = clock or WallClock(device)
    timings = {name: Timing() for name in steps}
    for r in range(repeats):
        if r >= least and time.monotonic() > deadline:
            break
        try:
            _round(r, steps, timings, clock, inner, shuffle, again or {})
        except KeyboardInterrupt:
            raise Interrupted(timings, r) from None
    return timings


def _round(
    r: int,
    steps: dict[str, Callable[[int], object]],
    timings: dict[str, Timing],
    clock: Clock,
    inner: int,
    shuffle: bool,
    again: Mapping[str, int],
) -> None:
    """One round of :func:`take_turns`."""
    order = list(steps.items())
    if shuffle:
        random.Random(r).shuffle(order)
    for name, step in order:
        if timings[name].error is not None:
            continue
        times = again.get(name, 1)
        indices = [index for index in range(r * inner, (r + 1) * inner) for _ in range(times)]
        try:
            timings[name].seconds.append(clock(partial(_each, step, indices)) / len(indices))
        except Exception as error:
            timings[name].error = error
            let_go(error)
            continue
        timings[name].indices.append(r * inner)
        timings[name].late += clock.late


def release(device: torch.device) -> None:
    """Free memory that is no longer in use. Captured graphs are held in reference cycles, which Python does
    not collect just because the GPU is short of memory."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def let_go(error: BaseException | None) -> None:
    """Release what the frames that raised ``error`` hold. It would live as long as the error does, and a step
    that ran out of memory would leave none for the others."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def _each(step: Callable[[int], object], indices: Sequence[int]) -> None:
    for index in indices:
        step(index)


class Matmul:
    """Square matmuls of a size that is fast on this device. ``best`` is the highest rate seen, in FLOP/s."""

    best = 0.0

    def __init__(self, device: torch.device, dtype: torch.dtype):
        self.device, self.dtype = device, dtype
        sizes = (4096, 8192) if device.type == "cuda" else (512, 1024)
        found = {size: self._prepare(size).rate(PROBE_SECONDS / len(sizes)) for size in sizes}
        self._prepare(max(found, key=lambda size: found[size]))

    def _prepare(self, size: int) -> "Matmul":
        self.size = size
        self.a, self.b = (torch.randn(size, size, device=self.device).to(self.dtype) for _ in range(2))
        # Bursts of 4 GFLOP on a CPU, 10 TFLOP on a GPU: long enough for the timer, short next to a step.
        self.calls = max(1, round((1e13 if self.device.type == "cuda" else 4e9) / (2 * size**3)))
        return self

    def rate(self, seconds: float) -> float:
        """The best rate, in FLOP/s, of the bursts that start within ``seconds``."""
        end = time.monotonic() + seconds
        timing = take_turns({"": self}, self.device, repeats=MAX_BURSTS, deadline=end)[""]
        if timing.error is not None:
            raise timing.error
        return self.see(timing)

    def see(self, timing: Timing) -> float:
        """The best rate of the timed calls, which updates ``best`` if it is the highest so far."""
        rate = self.flops / min(timing.seconds)
        self.best = max(self.best, rate)
        return rate

    def __call__(self, index: int = 0) -> None:
        for _ in range(self.calls):
            torch.mm(self.a, self.b)

    @property
    def flops(self) -> int:
        """FLOPs of one call."""
        return self.calls * 2 * self.size**3


class Copy:
    """A copy that moves ``moved`` bytes in total: it reads half of them and writes the other half."""

    def __init__(self, device: torch.device, moved: int):
        self.source = torch.zeros(max(1, moved // 2), dtype=torch.uint8, device=device)
        self.target = self.source.clone()

    def __call__(self, index: int = 0) -> None:
        self.target.copy_(self.source)

    @property
    def bytes(self) -> int:
        return 2 * self.source.numel()


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages behind ``tensors``, each counted once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def module_tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def pool_bytes(pool: tuple[int, int]) -> int:
    """Bytes held by the CUDA graphs of a memory pool."""
    segments = torch.cuda.memory_snapshot()
    return sum(segment["total_size"] for segment in segments if tuple(segment["segment_pool_id"]) == pool)


def peak_bytes(step: Callable[[int], object], device: torch.device) -> int:
    """Peak memory of one call of ``step``, in bytes beyond what was allocated before it."""
    if device.type == "cuda":
        synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step(0)
        synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with _quiet_stderr(), torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        step(0)
    held = highest = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            highest = max(highest, held)
    return highest


@contextlib.contextmanager
def _quiet_stderr() -> Iterator[None]:
    """Drop what C++ writes to stderr: the profiler's greeting and warnings of every block older than it."""
    sys.stderr.flush()
    saved = os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
