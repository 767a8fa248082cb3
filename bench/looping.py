"""Measure what the training loop adds to a step, and how long saving a checkpoint blocks it."""

import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch
from rich.console import Console
from torch import Tensor

import feed
from mdt_fast.config import RunConfig
from mdt_fast.presets import PRESETS
from mdt_fast.training import loop
from mdt_fast.training.loop import STEP, posterior_noise
from mdt_fast.training.objective import draw, losses_of, total_loss
from mdt_fast.training.parallelize import autocasting
from mdt_fast.training.run import Run, derive_seed, prepare
from mdt_fast.training.saving import Saver
from measure import Spread, rates, spread, synchronize

if TYPE_CHECKING:
    from training import Request

WARM_UP = 3  # steps that touch memory for the first time and, on a GPU, compile blocks
INNER = {"cpu": 1, "cuda": 20}  # steps per turn; enough for a GPU to run behind the host, as in training
LOG_EVERY = 5  # turns; the cost of a row is then spread over the recipe's steps between two rows
SAVES = 5


def config_of(request: "Request") -> RunConfig:
    """The recipe, on encoded noise or, if it has a data source, on that; float32 on a CPU."""
    config, cuda = PRESETS[request.args.preset], request.device.type == "cuda"
    settings = replace(
        config.train, batch_size=request.args.batch, device=str(request.device), save_every=10**9, keep=1,
        lr_anneal_steps=0, dtype=config.train.dtype if cuda else "float32",
        compile=config.train.compile if cuda else "none",
    )  # fmt: skip
    data = config.data
    if not data.source:
        encoded = request.folder / "latents"
        if not encoded.exists():
            feed.write_latents(encoded, data.image_size)
        data = replace(data, source=str(encoded), vae=None)
    return replace(config, train=settings, data=data)


def steps(request: "Request") -> None:
    """Time the whole loop and the bare step in alternating turns, with one model in one training run."""
    config = config_of(request)
    inner, preset = INNER[request.device.type], config.train.log_every
    turns = request.repeats + request.repeats // (LOG_EVERY - 1)  # one in LOG_EVERY writes a row
    watch = Watch(request.device, inner, turns)
    total = WARM_UP + inner * turns + 1
    config = replace(config, train=replace(config.train, steps=total, log_every=LOG_EVERY * inner))
    with (
        suppress(Enough),
        patch.object(loop, "prepare", watch.prepare),
        patch.object(loop, "train_step", watch.train_step),
    ):
        loop.train(config, request.folder / "run", console=Console(quiet=True))
    plain = [turn for turn in watch.turns if not turn.logged]
    logged = [turn for turn in watch.turns if turn.logged]
    # A GPU's steps end after the host has left them, so there the whole turn shows what a row costs.
    where = "whole" if request.device.type == "cuda" else "outside"
    taken = [[getattr(turn, where) for turn in turns] for turns in (logged, plain)]
    row = max(0.0, spread(taken[0])[1] - spread(taken[1])[1]) if logged else 0
    overhead = [t.whole / t.bare - 1 + row / (preset * t.bare) for t in plain]
    shape = {"B": request.args.batch}
    more = {
        "dtype": config.train.dtype,
        "rounds": len(plain),
        "note": f"{request.args.preset}, {config.model.family}",
    }

    def add(provider: str, metric: str, unit: str, values: list[float], scale: float = 1.0) -> None:
        low, middle, high = spread(values)
        request.add(
            "step", provider, metric, unit, (low * scale, middle * scale, high * scale), shape, **more
        )

    add("bare", "ms", "ms", [t.bare for t in plain], 1e3)
    add("loop", "ms", "ms", [t.whole for t in plain], 1e3)
    add("loop", "overhead_share", "share", overhead)
    if where == "outside":
        add("loop", "outside_ms", "ms", [t.outside for t in plain], 1e3)
        add("loop", "outside_share", "share", [(t.outside + row / preset) / t.bare for t in plain])
    if logged:
        add("loop", "row_ms", "ms", [row], 1e3)


class Enough(Exception):
    """Raised when everything is measured."""


@dataclass
class Turn:
    """Seconds per step: of the whole loop, of its part outside ``train_step`` (including a GPU's backlog),
    and of the bare step after it. ``logged``: the turn wrote a row."""

    whole: float
    outside: float
    bare: float
    logged: bool


@dataclass
class Watch:
    """Interrupts training between two steps, when the next batch is requested, to run bare steps."""

    device: torch.device
    inner: int
    wanted: int
    turns: list[Turn] = field(default_factory=list)
    steps: int = 0
    inside: float = 0.0
    since: float = 0.0

    def prepare(self, *args: Any) -> Run:
        run = prepare(*args)
        batches = run.loader.batches

        def watched(first: int, last: int) -> Iterator[tuple[Tensor, Tensor]]:
            for batch in batches(first, last):
                yield batch
                self.border(run, *batch)

        run.loader.batches = watched  # type: ignore[method-assign]
        return run

    def train_step(self, *args: Any) -> None:
        start = time.perf_counter()
        ORIGINAL(*args)
        self.inside += time.perf_counter() - start

    def border(self, run: Run, batch: Tensor, y: Tensor) -> None:
        self.steps += 1
        done = self.steps - WARM_UP
        if done < 0 or done % self.inner:
            return
        synchronize(self.device)
        now = time.perf_counter()
        whole = now - self.since
        for _ in range(self.inner):
            bare_step(run, batch, y)
        synchronize(self.device)
        bare = time.perf_counter() - now
        if done > 0:
            logged = run.step % run.config.train.log_every < self.inner
            self.turns.append(
                Turn(whole / self.inner, (whole - self.inside) / self.inner, bare / self.inner, logged)
            )
        if len(self.turns) >= self.wanted:
            raise Enough
        self.inside, self.since = 0.0, time.perf_counter()


ORIGINAL = loop.train_step


def bare_step(run: Run, batch: Tensor, y: Tensor) -> None:
    """Only the arithmetic of a step: draws, latents, losses, backward pass, optimiser and moving average."""
    settings = run.config.train
    torch.manual_seed(derive_seed(settings.seed, STEP, run.step))
    draws = draw(run.model, run.diffusion, settings.batch_size, run.device)
    noise = posterior_noise(run)
    batch, y = batch.to(run.device, non_blocking=True), y.to(run.device, non_blocking=True)
    run.optimizer.zero_grad()
    x = run.first_stage(batch, noise)
    with autocasting(settings, run.sharded, run.device):
        loss = total_loss(losses_of(run.model, run.diffusion, x, y, draws))
    loss.backward()
    run.optimizer.step()


def saves(request: "Request") -> None:
    """Time a checkpoint of the whole state in interleaved rounds: as a copy in memory, saved asynchronously
    during further steps, and saved synchronously."""
    config = config_of(request)
    run = prepare(config, request.folder / "saved", None)
    metrics, _ = run.open()
    batch, y = next(iter(run.loader.batches(0, 1)))

    def step() -> float:
        start = time.perf_counter()
        loop.train_step(run, batch, y, metrics)
        synchronize(request.device)
        return time.perf_counter() - start

    for _ in range(WARM_UP):
        step()
    tensors = [*run.model.parameters(), *run.ema.tensors.values(), *_state(run)]
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    copies = [torch.empty_like(tensor, device="cpu") for tensor in tensors]
    waiting = Saver(run.out, run.world, keep=1, asynchronous=False)
    copied, held, slowed, written, whole = [], [], [], [], []
    run.save(metrics)  # touches its memory for the first time
    run.saver.wait()
    for _ in range(min(SAVES, request.repeats)):
        quiet = spread([step() for _ in range(3)])[1]
        start = time.perf_counter()
        with torch.no_grad():
            for copy, tensor in zip(copies, tensors):
                copy.copy_(tensor)
        copied.append(time.perf_counter() - start)

        start = time.perf_counter()
        run.save(metrics)
        held.append(time.perf_counter() - start)
        beside = []
        while run.saver.busy:
            beside.append(step())
        slowed.append(held[-1] + max(0.0, sum(beside) - quiet * len(beside)))
        run.saver.wait()
        written.append(time.perf_counter() - start)

        run.step += 1
        start = time.perf_counter()
        run.saver, asynchronous = waiting, run.saver
        run.save(metrics)
        whole.append(time.perf_counter() - start)
        run.saver = asynchronous
        run.step += 1
    run.saver.close()
    waiting.close()
    shape, rounds = {"bytes": size}, len(held)

    def add(provider: str, metric: str, unit: str, values: Spread) -> None:
        request.add("save", provider, metric, unit, values, shape, mode="save", rounds=rounds,
                    note=request.args.preset)  # fmt: skip

    for provider, seconds in (("copy", copied), ("asynchronous", held), ("synchronous", whole)):
        low, middle, high = spread(seconds)
        add(provider, "stall_ms", "ms", (low * 1e3, middle * 1e3, high * 1e3))
        if provider != "asynchronous":
            add(provider, "gb_per_s", "GB/s", rates(size / 1e9, spread(seconds)))
    low, middle, high = spread(slowed)
    add("asynchronous", "stall_with_slower_steps_ms", "ms", (low * 1e3, middle * 1e3, high * 1e3))
    low, middle, high = spread(written)
    add("asynchronous", "written_after_ms", "ms", (low * 1e3, middle * 1e3, high * 1e3))


def _state(run: Run) -> list[Tensor]:
    state = run.optimizer.state_dict()["state"].values()
    return [tensor for entries in state for tensor in entries.values()]
