"""Where a step's time goes, by class of kernel: ``throughput.py --breakdown``.

On a GPU each kernel's time is counted under its name; idle is the rest of the step's wall time, which is
measured separately, without the profiler. On a CPU it is each operation's own time over all threads; the
step's time is their sum.
"""

import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from rich.console import Console
from rich.table import Table
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

import tables
from formats import number, one_line
from inputs import Inputs, len_keeps
from measure import WallClock, release, synchronize
from providers import Modules, Skip, make
from rows import RowFile
from steps import Case, Step, step_of

WARM_UP, STEPS, TIMED = 3, 3, 7
LONGEST = 25
"""How many kernels, the longest, get a row each."""

CLASSES = {
    "attention": ("rel_attention", "flash", "fmha", "attention", "cudnn_generated", "sdpa"),
    "optimiser": ("adan", "adamw", "sumsq", "::step_kernel<", "multi_tensor", "foreach", "lerp"),
    "adaLN": ("ln_modulate", "gate_residual", "layer_norm", "layernorm"),
    "GELU": ("gelu",),
    "tokens": ("gather_tokens", "unmask_tokens", "merge_tokens", "patch_embed", "mask_plan", "move_rows"),
    "matmul": (
        "gemm", "gemv", "nvjet", "cutlass", "cublas", "xmma", "splitk", "_mm_", "::mm", "::addmm", "::bmm",
        "::baddbmm", "linear", "weight_gradient",
    ),
    "copy": ("memcpy", "memset", "copy", "::fill_", "::zero_", "::cat", "catarray", "fillfunctor"),
}  # fmt: skip
"""Classes by parts of a kernel's name; the first that fits counts, and all others are ``elementwise``."""
NAMES = (*CLASSES, "elementwise", "idle")


@dataclass
class Line:
    """One provider: ms and launches per step by class, and the longest kernels (name, ms, launches)."""

    name: str
    ms: float = 0.0
    classes: dict[str, float] = field(default_factory=dict)
    launches: dict[str, float] = field(default_factory=dict)
    longest: list[tuple[str, float, float]] = field(default_factory=list)
    note: str | None = None


def class_of(name: str) -> str:
    """The class of a kernel, by its name."""
    lowered = name.lower()
    return next((c for c, parts in CLASSES.items() if any(part in lowered for part in parts)), "elementwise")


def run(
    case: Case,
    names: Sequence[str],
    modules: Modules,
    inputs: Inputs,
    rows: RowFile,
    say: Callable[[str], None],
) -> list[Line]:
    """The breakdown of each provider, whose rows are written too. A provider that cannot run gets a line that
    says why."""
    lines = []
    for name in names:
        say(f"{case.title}: {name}")
        torch._dynamo.reset()
        release(case.device)
        line = Line(name)
        try:
            measure(line, step_of(case, make(name, modules), inputs, len_keeps(case.config, 1)), case.device)
        except Skip as reason:
            line.note = f"skipped: {reason}"
        except Exception as error:
            line.note = f"failed: {one_line(error)}"
        lines.append(line)
        keep(case, line, rows)
    return lines


def measure(line: Line, step: Step, device: torch.device) -> None:
    """Measure and fill in ``line``. All steps keep the same number of tokens."""
    clock = WallClock(device)
    for _ in range(WARM_UP):
        step(0)
    on_gpu = device.type == "cuda"
    if on_gpu:
        line.ms = 1e3 * statistics.median(clock(lambda: step(0)) for _ in range(TIMED))
    # On a GPU record kernels only: reading the host's operations would take a minute and is not needed.
    activity = ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU
    with profile(activities=[activity], acc_events=True) as found:
        for _ in range(STEPS):
            step(0)
        synchronize(device)
    kernels: dict[str, list[float]] = defaultdict(list)
    for event in found.events():
        if on_gpu and event.device_type == DeviceType.CUDA and not event.is_user_annotation:
            kernels[event.name].append(event.time_range.elapsed_us() / 1e3)
        elif not on_gpu and event.device_type == DeviceType.CPU and event.self_cpu_time_total:
            kernels[event.name].append(event.self_cpu_time_total / 1e3)
    line.classes, line.launches = dict.fromkeys(NAMES, 0.0), dict.fromkeys(NAMES, 0.0)
    for name, each in kernels.items():
        line.classes[class_of(name)] += sum(each) / STEPS
        line.launches[class_of(name)] += len(each) / STEPS
    if not on_gpu:
        line.ms = sum(line.classes.values())
    line.classes["idle"] = max(0.0, line.ms - sum(line.classes.values()))
    ranked = sorted(kernels.items(), key=lambda item: -sum(item[1]))[:LONGEST]
    line.longest = [(name, sum(each) / STEPS, len(each) / STEPS) for name, each in ranked]


def keep(case: Case, line: Line, rows: RowFile) -> None:
    fields = {"bench": "breakdown", "model": case.model, "provider": case.label(line.name), "mode": case.mode}
    fields |= {"batch": case.batch, "dtype": case.dtype_name, "switches": {}}
    if line.note is not None:
        rows.add(metric=line.note.partition(":")[0], unit="", note=line.note.partition(": ")[2], **fields)
        return
    rows.add((None, line.ms, None), metric="ms", unit="ms/step", **fields)
    for name in NAMES:
        note = f"{line.launches[name]:.0f} launches"
        rows.add((None, line.classes[name], None), metric=f"ms_{name}", unit="ms/step", note=note, **fields)
    for name, ms, launches in line.longest:
        note = f"{name[:200]}, {launches:.0f} launches"
        rows.add((None, ms, None), metric="kernel_ms", unit="ms/step", note=note, **fields)


def show(console: Console, case: Case, lines: Sequence[Line]) -> None:
    """Print a table of classes and providers, and the longest kernels of each provider."""
    console.print()
    tables.say(console, f"breakdown · {case.title}", "bold")
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("ms a step (launches)")
    measured = [line for line in lines if line.note is None]
    for line in measured:
        table.add_column(line.name, justify="right")
    for name in NAMES:
        cells = [
            f"{number(one.classes[name])} {one.classes[name] / one.ms:4.0%} ({one.launches[name]:.0f})"
            for one in measured
        ]
        table.add_row(name, *cells)
    table.add_row("all", *[f"{number(one.ms)} ({sum(one.launches.values()):.0f})" for one in measured])
    console.print(table)
    for line in lines:
        if line.note is not None:
            tables.say(console, f"{line.name}: {line.note}")
        for name, ms, launches in line.longest:
            print(f"  {line.name}  {ms:9.3f} ms {launches:6.0f}  {class_of(name):11}  {name[:110]}")
