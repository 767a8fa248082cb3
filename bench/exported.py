"""Time a guided sampling step: eager, exported, and compiled by AOTInductor, in interleaved rounds.

``python bench/exported.py --model MDT_S_4`` uses seeded random weights and one image with guidance. It prints
the seconds needed to make each file, the file's size, and milliseconds per step (p20, median, p80).
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import command
import mdt_fast
from mdt_fast.config import DiffusionConfig, SampleConfig
from mdt_fast.errors import UserError, nearest
from mdt_fast.models.zoo import SHAPES
from mdt_fast.sampling import export_step, read_description
from mdt_fast.sampling.export import Step, load_step


def compare(name: str, batch: int, rounds: int) -> None:
    torch.manual_seed(0)
    model = getattr(mdt_fast, name)().eval()
    config = SampleConfig(sampler="ddpm", steps=250, cfg_scale=3.8)
    calls: dict[str, Any] = {"eager": Step(model, DiffusionConfig(), clip=False, guided=True)}
    with tempfile.TemporaryDirectory() as folder:
        for kind in ("exported", "compiled"):
            path, began = Path(folder) / f"{kind}.pt2", time.perf_counter()
            export_step(model, DiffusionConfig(), path, config, aoti=kind == "compiled")
            seconds, size = time.perf_counter() - began, path.stat().st_size
            print(f"{kind}: made in {seconds:.0f} s, {size / 2**20:.0f} MiB", flush=True)
            calls[kind] = load_step(path)[0]
        steps = read_description(path)["steps"]
    x = torch.randn(batch, model.in_channels, model.input_size, model.input_size)
    t, row, scale = (torch.tensor(steps[key][100]) for key in ("t", "row", "scale"))
    y = torch.arange(batch) % model.num_classes
    times: dict[str, list[float]] = {kind: [] for kind in calls}
    with torch.no_grad():
        for _ in range(rounds + 1):
            for kind, call in calls.items():
                began = time.perf_counter()
                call(x, t[None], y, torch.randn_like(x), row, scale[None])
                times[kind].append(1e3 * (time.perf_counter() - began))
    for kind, values in times.items():
        low, *_, high = statistics.quantiles(values[1:], n=5)  # the first is a warm-up
        print(f"{kind:9} {statistics.median(values[1:]):8.1f} ms a step (p20 {low:.1f}, p80 {high:.1f})")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark. Returns 0; 2 after a user error; 130 after Ctrl-C."""
    return command.guarded("exported", lambda kept: _main(argv))


def _main(argv: Sequence[str] | None) -> int:
    args = _parser().parse_args(argv)
    if args.model not in SHAPES:
        raise UserError(
            f"--model: got {args.model!r}{nearest(args.model, SHAPES)}, expected {', '.join(SHAPES)}"
        )
    command.at_least_one("--batch", args.batch)
    if args.rounds < 2:
        raise UserError(f"--rounds: got {args.rounds}, expected 2 or more")
    command.set_threads(args.threads)
    compare(args.model, args.batch, args.rounds)
    return 0


def _parser() -> command.Parser:
    parser = command.Parser(prog="exported", description=__doc__)
    parser.add_argument("--model", default="MDT_S_4", metavar="FACTORY", help="model (default: MDT_S_4)")
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="batch size (default: 1)")
    parser.add_argument("--rounds", type=int, default=25, metavar="N", help="timed rounds (default: 25)")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="CPU threads (default: 1)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
