"""Choose what the user leaves open: sizes that fit the time limit, based on a probe and counted FLOPs."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

import providers
from formats import number
from inputs import len_keeps
from mdt_fast.config import ModelConfig
from mdt_fast.models import flops
from measure import Matmul
from request import Request

TIME_LIMIT = 180.0
START_SECONDS = 15.0
"""Time for imports, weights and the probe."""

EFFICIENCY = 0.35
"""Share of the matmul rate that an eager model is expected to reach (measured on a CPU: 0.35 to 0.37)."""

ROUNDS = 10
"""Rounds a case should have time for, including comparison, warm-up and the memory measurement."""

MAX_REPEATS = 15
BATCHES = (256, 128, 64, 32, 16, 8, 4, 2, 1)
CPU_MODEL = "MDTv2_S_2"
GPU_MODELS = ("MDTv2_XL_2", "MDTv2_L_2", "MDTv2_B_2", "MDTv2_S_2")

COMPILE_SECONDS = {"cpu": {"train": 5.0, "sample": 2.0}, "cuda": {"train": 7.0, "sample": 2.0}}
"""Seconds per block and compiled provider, with cold caches.

The CPU values are from MDTv2-S/2 with 13 blocks: 21 to 25 s for a sampling step on a quiet machine, 90 to
115 s for a training step on a busy one. On an H200 with 16 cores, compiling XL/2's training step with 29
blocks had not finished after 190 s next to other work; the GPU values are a guess from that.
"""

ACTIVATION_FACTOR = 1.7
"""Activations of both passes relative to the unmasked one."""


@dataclass
class Plan:
    """What to run. ``providers`` and ``skipped`` (name: reason) are per mode; ``reasons``: what and why."""

    models: dict[str, ModelConfig]
    batches: list[int]
    time_limit: float
    repeats: int
    probe: Matmul | None = None
    providers: dict[str, list[str]] = field(default_factory=dict)
    skipped: dict[str, dict[str, str]] = field(default_factory=dict)
    reasons: list[str] = field(default_factory=list)


@dataclass
class Machine:
    """The result of the probe: a device and its matmul rate."""

    device: torch.device
    dtype: torch.dtype
    flops_per_s: float

    def step_seconds(self, config: ModelConfig, mode: str, batch: int) -> float:
        """The expected time of one eager step."""
        if mode == "train":
            work = flops.train_step(config, len_keeps(config, 1)[0]).flops
        else:
            work = flops.sample_step(config).flops
        return batch * work / (EFFICIENCY * self.flops_per_s)

    def fits(self, config: ModelConfig, batch: int) -> bool:
        """Whether eager training, with attention scores in float32, stays within half of a GPU's memory."""
        if self.device.type != "cuda":
            return True
        memory = torch.cuda.get_device_properties(self.device).total_memory
        tokens, blocks = config.grid_size**2, config.depth + 1
        block = 4 * tokens * (34 * config.hidden_size + 5 * config.num_heads * tokens)
        weights = 12 * config.hidden_size**2 * 1.6 * blocks * 4
        # Two sets of weights, gradients, optimiser state and moving average are on the GPU together.
        return batch * block * blocks * ACTIVATION_FACTOR + 2 * 7 * weights < 0.5 * memory


def pick(request: Request) -> Plan:
    """Fill in whatever the request leaves open."""
    modes, dtypes, asked = request.modes, request.dtypes, request.providers
    limit = request.time_limit or (TIME_LIMIT if request.repeats is None else float("inf"))
    made = Plan(request.models or {}, request.batches or [], limit, request.repeats or MAX_REPEATS)
    if asked is not None:
        made.providers = {mode: list(asked) for mode in modes}
        made.skipped = {mode: {} for mode in modes}
        if request.models is not None and request.batches is not None:
            return made
    made.probe = Matmul(request.device, dtypes[0])
    machine = Machine(request.device, dtypes[0], made.probe.best)
    planned = limit if limit < float("inf") else TIME_LIMIT
    budget = max(1.0, planned - START_SECONDS)
    made.reasons.append(
        f"probe: {number(machine.flops_per_s / 1e12)} TFLOP/s in {str(dtypes[0])[6:]} matmuls; "
        f"planning for about {planned:.0f} s"
    )
    if request.models is None:
        _pick_model(made, machine, modes, budget)
    eager = asked or ["reference", "fast"] + ["official"] * (request.checkout is not None)
    eager = [name for name in eager if not name.endswith("-compiled")] or ["reference"]
    if request.batches is None:
        _pick_batch(made, machine, modes, len(dtypes), len(eager), budget)
    if asked is None:
        _pick_providers(made, machine, modes, len(dtypes), eager, budget)
    return made


def _pick_model(made: Plan, machine: Machine, modes: Sequence[str], budget: float) -> None:
    candidates = GPU_MODELS if machine.device.type == "cuda" else (CPU_MODEL,)
    for name in candidates:
        config = providers.model_config(name)
        compiling = 2 * sum(_compile_seconds(machine, config, mode) for mode in modes)
        if name == candidates[-1] or (compiling < 0.7 * budget and machine.fits(config, 4)):
            made.models = {name: config}
            why = (
                "the smallest published MDTv2"
                if name == CPU_MODEL
                else "the largest whose compiling fits the time"
            )
            made.reasons.append(f"model: {name}, {why}")
            return


def _eager_seconds(
    made: Plan, machine: Machine, modes: Sequence[str], batch: int, dtypes: int, eager: int
) -> float:
    return sum(
        ROUNDS * eager * dtypes * machine.step_seconds(config, mode, batch)
        for config in made.models.values()
        for mode in modes
    )


def _pick_batch(
    made: Plan, machine: Machine, modes: Sequence[str], dtypes: int, eager: int, budget: float
) -> None:
    for batch in BATCHES:
        seconds = _eager_seconds(made, machine, modes, batch, dtypes, eager)
        fits = all(machine.fits(config, batch) for config in made.models.values())
        if batch == BATCHES[-1] or (seconds <= 0.6 * budget and fits):
            made.batches = [batch]
            made.reasons.append(
                f"batch: {batch}; {ROUNDS} eager rounds of each mode are expected to take {seconds:.0f} s at "
                f"{EFFICIENCY:.0%} of the probe (aim: no more than {0.6 * budget:.0f} s)"
            )
            return


def _pick_providers(
    made: Plan, machine: Machine, modes: Sequence[str], dtypes: int, eager: list[str], budget: float
) -> None:
    """Pick the eager providers, and compiled ones while there is time, from the cheapest mode upwards."""
    left = budget - sum(_eager_seconds(made, machine, modes, b, dtypes, len(eager)) for b in made.batches)
    compiled = ["reference-compiled", "fast-compiled"]
    obstacle = providers.compile_obstacle(machine.device)
    for mode in sorted(modes, key=lambda mode: COMPILE_SECONDS["cpu"][mode]):
        seconds = sum(_compile_seconds(machine, config, mode) for config in made.models.values())
        seconds *= len(compiled) * dtypes * len(made.batches)
        made.skipped[mode] = {}
        made.providers[mode] = ["reference", "reference-compiled", "fast", "fast-compiled", *eager[2:]]
        if obstacle is None and seconds <= left:
            left -= seconds
            continue
        made.providers[mode] = eager
        reason = obstacle or (
            f"compiling two providers is expected to take {seconds:.0f} s, {max(left, 0):.0f} s are left; "
            f"ask with --providers {','.join(compiled)} or a longer --time-limit"
        )
        made.skipped[mode] = dict.fromkeys(compiled, reason)


def _compile_seconds(machine: Machine, config: ModelConfig, mode: str) -> float:
    return (config.depth + 1) * COMPILE_SECONDS[machine.device.type][mode]
