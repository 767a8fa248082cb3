"""Calculate how a training step scales to many GPUs: bytes sent, predicted time and smallest useful batch.

    python bench/scaling.py                                 the four MDTv2 on 8 to 512 H100s
    python bench/scaling.py --gpu a100 --network 200 --network-per node --batch 16
    python bench/scaling.py --model MDTv2_XL_2 --step-ms 110 --gpus 16,64
    python bench/scaling.py --markdown docs/scaling.md      writes that document's tables

Bytes are exact (``tests/bench/test_bench_network.py``). Times come from a model: the only measured quantity
is the time of a step on one GPU, if ``--rows`` has it. See docs/scaling.md.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

import command
import report
import tables
from formats import number
from mdt_fast.config import ModelConfig
from mdt_fast.errors import UserError
from mdt_fast.models.zoo import SHAPES
from mdt_fast.presets import PRESETS
from mdt_fast.training.parallelize import DTYPES
from network import (
    Link,
    Links,
    Prediction,
    compute_seconds,
    positive,
    predict,
    smallest_batch,
)
from providers import NAMES, in_turn, precision
from rows import Row, few, read
from traffic import MODES, Layout, Mode

BEGIN, END = "<!-- scaling:begin -->", "<!-- scaling:end -->"
MODELS = "MDTv2_S_2,MDTv2_B_2,MDTv2_L_2,MDTv2_XL_2"
MFU = 0.4
# From NCCL's own model of a ring, protocol LL128: seconds per hop within a machine and between machines, and
# per call.
NODE_LATENCY, NETWORK_LATENCY, CALL = 1.9e-6, 4.0e-6, 10e-6


@dataclass(frozen=True)
class Gpu:
    """Data-sheet figures: dense bfloat16 FLOP/s, and bytes/s over NVLink in each direction. ``word`` is part
    of the driver's name for the GPU."""

    peak: float
    nvlink: float
    word: str


GPUS = {
    "a100": Gpu(312e12, 300e9, "A100"),
    "h100": Gpu(989e12, 450e9, "H100"),
    "h200": Gpu(989e12, 450e9, "H200"),
    "b200": Gpu(2250e12, 900e9, "B200"),
}


@dataclass(frozen=True)
class Model:
    """Seconds per image of a training step on one GPU: ``seconds`` as FSDP runs it, ``whole`` with unsharded
    weights, which may use one CUDA graph and bfloat16 weights. ``source`` says where they come from."""

    name: str
    config: ModelConfig
    seconds: float
    whole: float
    source: str

    def of(self, mode: Mode) -> float:
        return self.whole if mode == "ddp" else self.seconds


@dataclass(frozen=True)
class Point:
    model: Model
    label: str
    layout: Layout
    prediction: Prediction
    smallest: int | None

    @property
    def gigabytes(self) -> str:
        within, between = self.prediction.step.sent
        return f"{number(within / 1e9)} + {number(between / 1e9) if between else '0'}"

    @property
    def efficiency(self) -> str:
        return f"{self.prediction.efficiency:.0%} ({self.smallest or '-'})"


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table, or write the tables to ``--markdown``. Returns 0, or 2 after a user error."""
    argv = list(sys.argv[1:] if argv is None else argv)
    return command.guarded("scaling", lambda kept: _main(argv))


def _main(argv: list[str]) -> int:
    args = parser().parse_args(argv)
    request = Request(args)
    assumptions = request.assumptions()
    if args.markdown is None:
        show(request, assumptions)
        return 0
    line = shlex.join(["python", "bench/scaling.py", *argv])
    report.put(args.markdown, markdown(request, assumptions, line), BEGIN, END, "--markdown")
    print(f"wrote the tables into {args.markdown}")
    return 0


def parser() -> command.Parser:
    made = command.Parser("scaling", "Bytes, predicted time and smallest batch of a step on many GPUs.")
    add = made.add_argument
    add("--model", default=MODELS, help="published models, comma-separated (default: MDTv2 S/2 to XL/2)")
    add("--gpus", default="8,16,32,64,128,256,512", help="numbers of GPUs, comma-separated")
    add("--gpus-per-node", type=int, default=8, metavar="N")
    add("--mode", default="fsdp,hybrid", help=f"comma-separated, from {', '.join(MODES)}")
    add("--dtype", default="bfloat16", help="dtype in which weights are gathered")
    add("--batch", type=int, default=32, help="images on each GPU (default: 32)")
    add("--separate", action="store_true", help="run the two passes of a step separately, not packed")
    add("--gpu", default="h100", help=f"take data-sheet peak and NVLink from one of {', '.join(GPUS)}")
    add("--network", type=float, default=400, metavar="GBIT", help="bandwidth in Gbit/s (default: 400)")
    add("--network-per", default="gpu", help="whether --network is per gpu (default) or per node")
    add("--link-share", type=float, default=0.8, help="share of these rates that collectives reach (0.8)")
    add("--mfu", type=float, help=f"share of peak that compute reaches (default: measured, else {MFU})")
    add("--step-ms", type=float, help="a step's time on one GPU at --batch, for a single --model")
    add("--rows", type=Path, nargs="*", help="files with measured steps (default: bench/results/*.jsonl)")
    add("--target", type=float, default=0.9, help="efficiency for the smallest batch (default: 0.9)")
    add("--markdown", type=Path, metavar="FILE", help=f"write tables between {BEGIN} and {END}")
    return made


def one_of(option: str, text: str, allowed: Sequence[str]) -> str:
    """The name in ``text``. Raises ``UserError`` if it is not a single one of ``allowed``."""
    found = command.names(option, text, allowed)
    if len(found) > 1:
        raise UserError(f"{option}: got {text!r}, expected one of {', '.join(allowed)}")
    return found[0]


class Request:
    """The checked command line."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        gpu = one_of("--gpu", args.gpu, tuple(GPUS))
        per = one_of("--network-per", args.network_per, ("gpu", "node"))
        one_of("--dtype", args.dtype, tuple(DTYPES))
        self.modes: list[Mode] = [*command.names("--mode", args.mode, MODES)]  # type: ignore[list-item]
        command.at_least_one("--batch", args.batch)
        command.at_least_one("--gpus-per-node", args.gpus_per_node)
        positive("--network", args.network, "Gbit/s")
        if not 0 < args.target < 1:
            raise UserError(f"--target: got {args.target}, expected a number between 0 and 1")
        for option, value in (("--link-share", args.link_share), ("--mfu", args.mfu)):
            if value is not None and not 0 < value <= 1:
                raise UserError(f"{option}: got {value}, expected a number above 0, up to 1")
        self.gpu, self.per = GPUS[gpu], per
        numbers = [command.whole("--gpus", text) for text in command.listed("--gpus", args.gpus)]
        try:
            self.layouts = [Layout(gpus, args.gpus_per_node) for gpus in numbers]
        except UserError as error:
            said = str(error).replace("gpus_per_node", "--gpus-per-node")
            raise UserError(f"--{said}") from None
        self.network = args.network * 1e9 / 8 / (args.gpus_per_node if per == "node" else 1)
        self.links = Links(
            Link(self.gpu.nvlink * args.link_share, NODE_LATENCY),
            Link(self.network * args.link_share, NETWORK_LATENCY),
            CALL,
        )
        self.models = self._models(command.names("--model", args.model, tuple(SHAPES)))

    def _models(self, names: list[str]) -> list[Model]:
        args = self.args
        if args.step_ms is not None:
            positive("--step-ms", args.step_ms, "milliseconds")
            if len(names) > 1 or args.mfu is not None:
                raise UserError("--step-ms: needs a single --model, and no --mfu")
        found = []
        for name in names:
            family, size, patch = name.lower().split("_")
            config = PRESETS[f"{family}-{size}{patch}"].model
            sharded, whole = (None, None) if args.mfu is not None else self._measured(name)
            if args.step_ms is not None:
                seconds = alone = args.step_ms / 1e3 / args.batch
                source = f"{args.step_ms:g} ms given"
            elif sharded is not None and whole is not None:
                (seconds, source), (alone, other) = sharded, whole
                source += "" if other == source else f", not sharded {other}"
            else:
                mfu = args.mfu or MFU
                seconds = alone = compute_seconds(config, 1, self.gpu.peak, mfu)
                source = f"{mfu:.0%} of peak assumed"
            found.append(Model(name, config, seconds, alone, source))
        return found

    def _measured(self, name: str) -> tuple[tuple[float, str] | None, tuple[float, str] | None]:
        """Measured seconds per image of our fastest provider at the batch closest to the requested one, among
        those that FSDP can run and among all."""
        paths = self.args.rows if self.args.rows is not None else sorted(report.RESULTS.glob("*.jsonl"))
        rows = [
            row
            for row in read(paths)
            if (row["bench"], row.get("model"), row["mode"]) == ("throughput", name, "train")
            and (row["metric"], row["dtype"]) == ("ms", self.args.dtype)
            and row["provider"] in NAMES  # with default switches
            and row["provider"].startswith("fast")
            and "float8" not in row["provider"]
            and self.gpu.word in row["device"]
            and row["p50"]
        ]
        rows = [row for row in rows if not few(row)] or rows
        plain = [row for row in rows if not (precision(row["provider"]) or in_turn(row["provider"]))]
        return self._best([row for row in plain if "graphs" not in row["provider"]]), self._best(rows)

    def _best(self, rows: list[Row]) -> tuple[float, str] | None:
        if not rows:
            return None
        best = min(rows, key=lambda row: (abs(row["batch"] - self.args.batch), row["p50"]))
        seconds = best["p50"] / 1e3 / best["batch"]
        return seconds, f"{best['p50']:.4g} ms measured at batch {best['batch']} ({best['device']})"

    def point(self, model: Model, mode: Mode, layout: Layout, separate: bool | None = None) -> Point:
        args = self.args
        packed = not (args.separate if separate is None else separate)
        one = predict(
            model.config, layout, self.links, args.batch * model.of(mode),
            mode=mode, dtype=args.dtype, packed=packed,
        )  # fmt: skip
        smallest = smallest_batch(
            model.config, layout, self.links, model.of(mode),
            target=args.target, mode=mode, dtype=args.dtype, packed=packed,
        )  # fmt: skip
        return Point(model, mode if packed else f"{mode}, two passes", layout, one, smallest)

    def assumptions(self) -> str:
        """The assumptions of the model, in a sentence or two."""
        args, gpu = self.args, self.gpu
        sources = {source: [m.name for m in self.models if m.source == source] for source in
                   dict.fromkeys(model.source for model in self.models)}  # fmt: skip
        compute = "; ".join(
            source if len(sources) == 1 else f"{', '.join(names)}: {source}"
            for source, names in sources.items()
        )
        return (
            f"{gpu.word}: {gpu.peak / 1e12:g} TFLOP/s, NVLink {gpu.nvlink / 1e9:g} GB/s each way, network "
            f"{args.network:g} Gbit/s per {'machine' if self.per == 'node' else 'GPU'}, machines of "
            f"{args.gpus_per_node}; collectives reach {args.link_share:.0%} of it, and take "
            f"{CALL * 1e6:g} us and {NODE_LATENCY * 1e6:g} us (network: {NETWORK_LATENCY * 1e6:g} us) a hop. "
            f"Compute: {compute}. {args.batch} images on each GPU, {args.dtype}."
        )


def show(request: Request, assumptions: str) -> None:
    """Print one line per model, mode and number of GPUs."""
    console = Console(width=max(tables.WIDTH, Console().width))
    tables.say(console, assumptions, "dim")
    table = Table(box=None, padding=(0, 2, 0, 0))
    titles = ("GPUs", "ms/step", "waiting", "efficiency", "collectives", "GB sent: NVLink + network",
              f"batch for {request.args.target:.0%}")  # fmt: skip
    for title in ("model", "mode"):
        table.add_column(title)
    for title in titles:
        table.add_column(title, justify="right")
    for model in request.models:
        for mode in request.modes:
            for layout in request.layouts:
                point = request.point(model, mode, layout)
                one = point.prediction
                table.add_row(
                    model.name, point.label, str(layout.gpus), number(1e3 * one.step_s),
                    number(1e3 * one.exposed_s), f"{one.efficiency:.0%}", str(len(one.step.collectives)),
                    point.gigabytes, str(point.smallest or "none up to 4096"),
                )  # fmt: skip
    console.print(table)


def markdown(request: Request, assumptions: str, line: str) -> str:
    """The tables of docs/scaling.md."""
    points = {
        (model.name, mode): [request.point(model, mode, layout) for layout in request.layouts]
        for model in request.models
        for mode in request.modes
    }
    head = ["model", "mode", *(str(layout.gpus) for layout in request.layouts)]
    middle = request.layouts[len(request.layouts) // 2]
    ways: list[tuple[Mode, bool]] = [("fsdp", False), ("hybrid", False), ("fsdp", True), ("ddp", False)]
    compared = []
    for model in dict.fromkeys((request.models[0], request.models[-1])):
        for mode, separate in ways:
            point = request.point(model, mode, middle, separate)
            number_of, waiting = len(point.prediction.step.collectives), 1e3 * point.prediction.exposed_s
            cells = [point.gigabytes, number(waiting), point.efficiency]
            compared.append([model.name, point.label, str(number_of), *cells])
    return "\n\n".join(
        [
            f"{assumptions} `{line}`",
            "**Sent by each GPU in a step, GB: within its machine + over the network**, by number of GPUs:",
            _table(head, [[*key, *(p.gigabytes for p in row)] for key, row in points.items()]),
            f"**Predicted efficiency (and the images on each GPU from which on it is "
            f"{request.args.target:.0%})**, by number of GPUs:",
            _table(head, [[*key, *(p.efficiency for p in row)] for key, row in points.items()]),
            f"**Other ways, {middle.gpus} GPUs**:",
            _table(["model", "way", "collectives", "GB", "waiting, ms", "efficiency"], compared),
        ]
    )


def _table(head: list[str], lines: list[list[str]]) -> str:
    rule = ["---", "---", *(["---:"] * (len(head) - 2))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rule, *lines))


if __name__ == "__main__":
    sys.exit(main())
