"""What makes sampling fast, item by item: ``throughput.py --mode sample --account``.

A line is a complete run of a few steps, spread over the timesteps as 250 would be, guided by the power-cosine
schedule (one in ten steps has a weight of 1). Its time is per step of the batch. All lines draw from the same
noise and must arrive at the reference's picture. Predictions are clipped because with untrained weights they
would grow to hundreds. ``reference`` is the published loop around the plain model, with ``forward_with_cfg``
and the update as separate operations; ``diffusers`` is that library's DiTTransformer2DModel in the same loop.
Ops: operations that torch dispatched, without views (unknown for compiled code; for a CUDA graph only those
around it). Peak: peak memory in bytes beyond what was allocated before the run, including weights that are
cast once and the memory of graphs.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import tables
from account import ops
from formats import memory, number, one_line, ratio
from inputs import Inputs
from mdt_fast.config import DiffusionConfig, SampleConfig, SampleSwitches
from mdt_fast.sampling import Sampler, sampling_diffusion
from mdt_fast.sampling.generate import PerImageNoise
from measure import Spread, let_go, peak_bytes, pool_bytes, ratios, spread, storage_bytes, take_turns
from providers import Modules, Skip, make
from rows import RowFile
from steps import CFG_SCALE, Case

STEPS, ROUNDS = 10, 5
OFF = {torch.float32: 1e-4, torch.bfloat16: 1e-1}
"""Largest relative difference of a line's picture from the reference's."""
OFF_IN_FLOAT8 = 2e-1
"""The same in float8, whose products are ten times less exact than bfloat16's (emulated)."""
BOUND = 1e-3
"""The value of ``skip_below``; with the power-cosine schedule it applies to a third of 250 steps."""

PRECISIONS = {"fast with bfloat16 weights": "lean", "fast in float8": "float8"}
"""Further lines in bfloat16: a model with bfloat16 weights and block activations, and one with float8 matrix
products in its blocks."""

Draw = Callable[[int], object]


@dataclass
class Line:
    """A way to draw the batch. ``kept`` gives the bytes it keeps between batches, once it has drawn one;
    ``off`` is the relative difference from the reference's picture."""

    name: str
    draw: Draw
    kept: Callable[[], int]
    switches: dict[str, bool]
    off: float = 0.0
    found: dict[str, float] = field(default_factory=dict)
    ms: Spread = (0.0, 0.0, 0.0)
    ratio: Spread = (1.0, 1.0, 1.0)


def run(
    case: Case,
    modules: Modules,
    inputs: Inputs,
    rows: RowFile,
    say: Callable[[str], None],
    *,
    repeats: int,
    deadline: float,
    compiled: Sequence[str] = ("reference-compiled",),
) -> tuple[list[Line], list[str]]:
    """All lines of one case, and the reasons why some are missing. ``compiled`` names compiled forms of the
    reference to include, which take a minute on a GPU."""
    labels = inputs.labels_B.tolist()
    config = SampleConfig(
        steps=STEPS, sampler=case.sampler, cfg_scale=CFG_SCALE, dtype=case.dtype_name, batch_size=len(labels),
        scale_pow=None if case.config.family == "dit" else 4.0,
    )  # fmt: skip
    lines, missing = [], []
    for name in ("reference", *compiled, *["diffusers"] * (case.config.family == "dit")):
        try:
            provider = make(name, modules)
            provider.module.eval()  # or labels would be dropped
            lines.append(Line(name, published(case, provider.forward_with_cfg, config, labels), int, {}))
        except Skip as skip:
            missing.append(f"{name}: {skip}")
    lines += [
        Line(name, *drawing(modules.get("fast"), one, labels, switches), dataclasses.asdict(switches))
        for name, one, switches in settings(config)
    ]
    if case.dtype == torch.bfloat16:
        for name, precision in PRECISIONS.items():
            try:
                drawn = drawing(modules.get("fast", precision), config, labels, SampleSwitches())
                lines.append(Line(name, *drawn, dataclasses.asdict(SampleSwitches())))
            except Skip as skip:
                missing.append(f"{name}: {skip}")
    expected: Any = lines[0].draw(0)
    for line in list(lines):
        say(f"{case.title}: counting {line.name}")
        try:
            picture: Any = line.draw(0)  # captures the graphs
            if not line.name.endswith("-compiled"):  # it does not run compiled while operations are counted
                line.found["ops"] = ops(line.draw) / STEPS
            line.found["peak_bytes"] = line.kept() + peak_bytes(line.draw, case.device)
        except Exception as error:
            let_go(error)
            lines.remove(line)
            missing.append(f"{line.name}: {one_line(error)}")
            continue
        line.off = float((picture - expected).norm() / expected.norm())
        allowed = OFF_IN_FLOAT8 if "float8" in line.name else OFF[case.dtype]
        allowed += 10 * BOUND if "skip_below" in line.name else 0
        if not line.off <= allowed:
            lines.remove(line)
            missing.append(f"{line.name}: disagrees with the reference's picture by {line.off:.1e}")
            continue
    say(f"{case.title}: timing {len(lines)} lines in interleaved rounds")
    turns = {line.name: line.draw for line in lines}
    timings = take_turns(turns, case.device, repeats=repeats, deadline=deadline)
    base = timings["reference"].seconds
    for line, timing in zip(list(lines), timings.values(), strict=True):
        if timing.error is not None:
            if line.name == "reference":
                raise timing.error
            lines.remove(line)
            missing.append(f"{line.name}: {one_line(timing.error)}")
            continue
        line.ms = spread([1e3 * s / STEPS for s in timing.seconds])
        line.ratio = ratios(base, timing.seconds)
        common: dict[str, Any] = {
            "bench": "account", "model": case.model, "provider": line.name.split()[0], "mode": "sample",
            "batch": case.batch, "dtype": case.dtype_name, "note": line.name, "rounds": len(timing.seconds),
            "switches": {**line.switches, "sampler": case.sampler},
        }  # fmt: skip
        rows.add(line.ms, metric="ms", unit="ms/step", **common)
        rows.add(line.ratio, metric="speedup", unit="x", **common)
        for metric, unit in (("ops", "1"), ("peak_bytes", "B")):
            if metric in line.found:
                rows.add((None, line.found[metric], None), metric=metric, unit=unit, **common)
        rows.add((None, line.off, None), metric="off", unit="1", **common)
    return lines, missing


def settings(config: SampleConfig) -> list[tuple[str, SampleConfig, SampleSwitches]]:
    """The fast sampler as it is, without each of its switches, without any, and with ``skip_below``, which is
    not exact."""
    every = SampleSwitches()
    names = [f.name for f in dataclasses.fields(SampleSwitches)]
    if not torch.cuda.is_available():
        names.remove("cuda_graph")
    if config.dtype == "float32":  # nothing is cast
        names.remove("cast_once")
    return [
        ("fast", config, every),
        *((f"fast without {name}", config, replace(every, **{name: False})) for name in names),
        ("fast without any", config, SampleSwitches.none()),
        (f"fast with skip_below {BOUND:g}", replace(config, skip_below=BOUND), every),
    ]


def drawing(
    module: Any, config: SampleConfig, labels: list[int], switches: SampleSwitches
) -> tuple[Draw, Callable[[], int]]:
    """A way to draw with the fast sampler, and the bytes of its cast weights and captured graphs, which exist
    from the first batch on."""
    diffusion = sampling_diffusion(module.config, DiffusionConfig(), config)
    sampler = Sampler(module, diffusion, config, clip_denoised=True, switches=switches)
    casts = sampler.model.casts
    if casts:
        casts.refresh()
    cast = storage_bytes(part for cast in casts.cast for part in cast) if casts else 0

    def kept() -> int:
        graphs = sampler.model.graphs
        return cast + (0 if graphs is None else pool_bytes(graphs.pool))

    return lambda index: sampler(labels), kept


def published(case: Case, forward_with_cfg: Any, config: SampleConfig, labels: list[int]) -> Draw:
    """The loop of the published scripts, which processes 2n rows throughout."""
    diffusion = sampling_diffusion(case.config, DiffusionConfig(), config)
    y = torch.tensor([*labels, *[case.config.num_classes] * len(labels)], device=case.device)
    side = case.config.input_size
    like = torch.empty(len(y), case.config.in_channels, side, side, device=case.device)
    loop = diffusion.p_sample_loop if case.sampler == "ddpm" else diffusion.ddim_sample_loop

    def model(x: Tensor, t: Tensor) -> Tensor:
        half = case.dtype == torch.bfloat16
        with torch.autocast(case.device.type, torch.bfloat16, enabled=half):
            return forward_with_cfg(x, t, y, cfg_scale=CFG_SCALE).float()

    def draw(index: int) -> Tensor:
        noise = PerImageNoise(config.seed, 0, len(labels))
        both = lambda x: torch.cat([noise(x[: len(labels)])] * 2)  # noqa: E731
        return loop(model, like.shape, both(like), True, generator=both)[: len(labels)]

    return draw


def show(console: Console, case: Case, lines: list[Line], missing: list[str]) -> None:
    table = Table(box=None, padding=(0, 2, 0, 0))
    for title in ("drawing", "ms/step", "img/s at 250", "speed", "ops/step", "peak", "off"):
        table.add_column(title, justify="left" if title == "drawing" else "right")
    for line in lines:
        table.add_row(
            line.name, number(line.ms[1]), number(case.batch / (line.ms[1] / 1e3 * 250)), ratio(line.ratio),
            f"{line.found['ops']:.0f}" if "ops" in line.found else "", memory(line.found["peak_bytes"]),
            f"{line.off:.0e}",
        )  # fmt: skip
    console.print()
    tables.say(console, f"account · {case.title} · {case.sampler}, {STEPS} steps", "bold")
    console.print(table)
    for reason in missing:
        tables.say(console, reason)
