"""The cost of one training step, provider by provider and switch by switch: ``throughput.py --account``.

FLOPs: those of matmuls, as torch counts them on the meta device. Saved: bytes kept for the backward pass,
without parameters. Peak: peak memory in bytes beyond what was allocated before the step, as the allocator
reports it. Ops: operations that torch dispatched, without views; a registered op counts once, whatever it
calls (on a GPU this is about the number of launches). Gathers: how often FSDP, sharding by block, would
gather a block's weights, once for each call and once for its backward pass. Time: the median of a few
interleaved rounds, too few for a claim; use ``throughput.py`` without ``--account`` for that. On a GPU the
fast model's lines also have a time with the passes as one CUDA graph, which does not wait for the host. These
are measured one after another because the graphs of all lines together would take too much memory.
"""

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import tables
from formats import memory, number, one_line
from inputs import Inputs, len_keeps
from mdt_fast.config import Switches
from mdt_fast.models import flops
from measure import let_go, peak_bytes, release, spread, storage_bytes, take_turns
from providers import Modules, Provider, Skip, make
from rows import RowFile
from steps import Case, GraphedTrainStep, TrainStep

ROUNDS, GRAPH_ROUNDS = 3, 5
METRICS = {
    "flops": "FLOP",
    "saved_bytes": "B",
    "peak_bytes": "B",
    "ops": "1",
    "gathers": "1",
    "ms": "ms/step",
    "graph_ms": "ms/step",
}
DEFAULT = Switches()


@dataclass
class Line:
    """One line of the table: a provider, or the fast model with other switches."""

    name: str
    step: TrainStep
    switches: Switches | None
    found: dict[str, float]


def run(
    case: Case, modules: Modules, inputs: Inputs, rows: RowFile, say: Callable[[str], None]
) -> list[Line]:
    """Account of one case: the reference, the fast model, and the fast model with each switch flipped.

    Rows are written as soon as they are known. A line that fails, for lack of memory say, is left out or
    keeps what was found before; if the reference cannot be counted, the error is raised.
    """
    lengths = len_keeps(case.config, 1)
    lines: list[Line] = []
    reference = make("reference", modules)
    lines.append(Line("reference", TrainStep(case, reference, inputs, lengths, None), None, {}))
    fast = make("fast", modules)
    share = TrainStep(case, fast, inputs, lengths, None)
    for name, switches in settings(fast.module):
        lines.append(Line(name, TrainStep(case, fast, inputs, lengths, share), switches, {}))
    for line in list(lines):
        say(f"{case.title}: counting {line.name}")
        try:
            count(case, line, lengths[0])
        except Exception as error:
            if line is lines[0]:
                raise
            failed(line, error)
            lines.remove(line)
            continue
        write(rows, case, line, line.found)
    say(f"{case.title}: timing {len(lines)} lines in interleaved rounds")
    turns = {line.name: _turned(line) for line in lines}
    for line, timing in zip(lines, take_turns(turns, case.device, repeats=ROUNDS).values(), strict=True):
        if timing.error is not None:
            failed(line, timing.error)
            continue
        line.found["ms"] = spread([1e3 * s for s in timing.seconds])[1]
        write(rows, case, line, ["ms"])
    try:
        graphs = make("fast-graphs", modules)
    except Skip:
        graphs = None
    for line in lines[1:] if graphs is not None else ():
        say(f"{case.title}: {line.name} as a CUDA graph")
        known = as_graph(case, line, graphs, inputs)
        line.found |= known
        write(rows, case, line, known)
    if hasattr(fast.module, "set_switches"):
        fast.module.set_switches(DEFAULT)
    return lines


def write(rows: RowFile, case: Case, line: Line, metrics: Iterable[str]) -> None:
    """Write the rows of some of a line's metrics."""
    for metric in metrics:
        rows.add(
            (None, line.found[metric], None), bench="account", model=case.model, mode="train",
            provider=line.name.split()[0], batch=case.batch, dtype=case.dtype_name, metric=metric,
            switches={} if line.switches is None else dataclasses.asdict(line.switches), unit=METRICS[metric],
            note=line.name,
        )  # fmt: skip


def failed(line: Line, error: Exception) -> None:
    let_go(error)
    line.step.forget()
    print(f"{line.name}: {one_line(error)}")


def settings(module: nn.Module) -> list[tuple[str, Switches]]:
    """The fast model as it is, with each switch flipped, and without any. Switches that do not apply to the
    model are left out."""
    family = module.config.family
    without = {
        "dit": {"packed", "sorted_tokens", "masked_side", "thin_skip", "stored_scores"},
        "mdt": {"thin_skip"},
    }
    names = [f.name for f in dataclasses.fields(Switches) if f.name not in without.get(family, set())]
    turned = [
        (
            f"fast {'without' if getattr(DEFAULT, name) else 'with'} {name}",
            replace(DEFAULT, **{name: not getattr(DEFAULT, name)}),
        )
        for name in names
    ]
    return [("fast", DEFAULT), *turned, ("fast without any", Switches.none())]


def count(case: Case, line: Line, len_keep: int | None) -> None:
    """Fill in everything but the times."""
    implementation = line.step.provider.implementation
    unpacked = None if line.switches is None else replace(line.switches, packed=False)
    counted = flops.train_step(case.config, len_keep, implementation, case.batch, unpacked)
    step = _turned(line)
    step(0)  # creates the optimiser state
    line.step.forget()
    line.found |= {
        "flops": counted.flops,
        "saved_bytes": saved_bytes(line.step),
        "peak_bytes": peak_bytes(step, case.device),
        "ops": ops(step),
        "gathers": gathers(line.step, step),
    }


def _turned(line: Line) -> Callable[[int], None]:
    """The line's step, preceded by setting its switches."""

    def step(index: int) -> None:
        if line.switches is not None:
            line.step.module.set_switches(line.switches)
        line.step(index)

    return step


def as_graph(case: Case, line: Line, provider: Provider, inputs: Inputs) -> dict[str, float]:
    """``graph_ms`` of a line of the fast model; empty, with the reason printed, if capture fails."""
    provider.module.set_switches(line.switches)
    lengths = line.step.len_keeps
    turn = {line.name: GraphedTrainStep(case, provider, inputs, lengths, line.step)}
    first = take_turns(turn, case.device, repeats=1)[line.name]  # captures the graph
    timing = first if first.error else take_turns(turn, case.device, repeats=GRAPH_ROUNDS)[line.name]
    turn[line.name].forget()
    turn.clear()
    release(case.device)
    if timing.error is not None:
        print(f"{line.name}: no CUDA graph: {one_line(timing.error)}")
        return {}
    return {"graph_ms": spread([1e3 * s for s in timing.seconds])[1]}


def saved_bytes(owner: TrainStep) -> int:
    """Bytes of all storages that autograd keeps from the forward pass, without those of parameters."""
    parameters = {p.untyped_storage().data_ptr() for p in owner.module.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(x: Tensor) -> Tensor:
        if x.untyped_storage().data_ptr() not in parameters:
            kept.setdefault(x.untyped_storage().data_ptr(), x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        losses = [*owner.losses(0, owner.y)]  # kept alive, so that no storage is reused
    del losses
    return storage_bytes(kept.values())


class _Count(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += not func.is_view
        return func(*args, **(kwargs or {}))


def ops(step: Callable[[int], None]) -> int:
    with _Count() as counter:
        step(0)
    return counter.number


def gathers(owner: TrainStep, step: Callable[[int], None]) -> int:
    """Twice the number of block calls in a step: one gather before each call and one before its backward."""
    calls = 0

    def called(*_: object) -> None:
        nonlocal calls
        calls += 1

    blocks = [m for m in owner.module.modules() if type(m).__name__ in ("Block", "MDTBlock", "DiTBlock")]
    hooks = [block.register_forward_pre_hook(called) for block in blocks]
    try:
        step(0)
    finally:
        for hook in hooks:
            hook.remove()
    return 2 * calls


def show(console: Console, case: Case, lines: list[Line]) -> None:
    """Print the table. Next to each number is its ratio to the reference's; graph times are compared with
    that of the fast model."""
    base = lines[0].found
    graphs = next((line.found["graph_ms"] for line in lines if "graph_ms" in line.found), None)
    table = Table(box=None, padding=(0, 2, 0, 0))
    for title in ("one training step", "GFLOP", "saved", "peak", "ops", "gathers", "ms"):
        table.add_column(title, justify="left" if title.startswith("one") else "right")
    if graphs is not None:
        table.add_column("ms, one graph", justify="right")
    for line in lines:
        cells = [
            f"{shown} {line.found[metric] / base[metric]:4.2f}x"
            for metric, shown in (
                ("flops", number(line.found["flops"] / 1e9)),
                ("saved_bytes", memory(int(line.found["saved_bytes"]))),
                ("peak_bytes", memory(int(line.found["peak_bytes"]))),
                ("ops", f"{line.found['ops']:.0f}"),
                ("gathers", f"{line.found['gathers']:.0f}"),
                ("ms", number(line.found.get("ms", 0.0))),
            )
            if metric in line.found and metric in base
        ]
        cells += [""] * (6 - len(cells))
        if graphs is not None and "graph_ms" in line.found:
            cells.append(f"{number(line.found['graph_ms'])} {line.found['graph_ms'] / graphs:4.2f}x")
        table.add_row(line.name, *cells)
    console.print()
    tables.say(console, f"account · {case.title}", "bold")
    console.print(table)
    tables.say(
        console,
        "saved: bytes kept for the backward pass; peak: memory beyond what was allocated before; ops: as "
        f"dispatched; gathers: FSDP's; ms: of {ROUNDS} rounds, too few for a claim; x: of the reference",
    )
