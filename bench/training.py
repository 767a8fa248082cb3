"""Measure what surrounds a training step: loading data, encoding it, the training loop, saving checkpoints.

    python bench/training.py                              all parts; on two CPU cores about five minutes
    python bench/training.py --parts loader --workers 1,4,8 --consumes 10450
    python bench/training.py --parts encode --vae PATH    mdt-fast encode with a published autoencoder
    python bench/training.py --parts step,save --preset mdtv2-xl2 --device cuda --json rows.jsonl

``loader`` measures rows/s of the loader alone, for encoded latents, JPEG files and the digits, and the ratio
to what a model consumes (``--consumes``, img/s). ``encode`` measures img/s of ``mdt-fast encode``. ``step``
compares a step of the whole loop with the bare step (draws, losses, backward pass, optimiser), in interleaved
rounds. ``save`` measures how long saving a checkpoint blocks training, asynchronously or not, compared with
copying the same tensors in memory.
"""

import argparse
import shlex
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

import command
import feed
import looping
from formats import interval, number, sizes
from mdt_fast.errors import UserError, nearest
from mdt_fast.presets import PRESETS
from measure import Spread
from rows import RowFile, machine

CONSUMES = 603.0
"""img/s: the most MDTv2-XL/2 can consume on an H200, at 790 TFLOP/s and 1.31 TFLOP per image and step."""

PARTS = ("loader", "encode", "step", "save")


@dataclass
class Request:
    """The checked command line. ``add`` stores a row and prints it."""

    args: argparse.Namespace
    device: torch.device
    rows: RowFile
    folder: Path

    @property
    def repeats(self) -> int:
        return self.args.repeats

    def add(
        self,
        op: str,
        provider: str,
        metric: str,
        unit: str,
        values: Spread,
        shape: dict[str, int],
        **more: Any,
    ) -> None:
        row = {"mode": "train", "dtype": "float32", "switches": {}, "rounds": self.repeats, **more}
        self.rows.add(
            values, bench="training", op=op, provider=provider, metric=metric, unit=unit, shape=shape, **row
        )
        scale, shown = (100, "%") if unit == "share" else (1, unit)
        low, middle, high = (value * scale for value in values)
        found = f"{number(middle):>8} {shown} ({interval(low, high)})"
        print(f"{op:16} {provider:14} {found} {metric}, {sizes(shape)}", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure. Returns 0; 2 after a user error; 130 after Ctrl-C."""
    argv = list(sys.argv[1:] if argv is None else argv)
    return command.guarded("training", lambda kept: _main(argv, kept))


def _main(argv: list[str], kept: command.Kept) -> int:
    args = _parser().parse_args(argv)
    parts = command.names("--parts", args.parts, PARTS)
    for name in ("repeats", "batch", "images", "size"):
        command.at_least_one(f"--{name}", getattr(args, name))
    if not args.consumes > 0:
        raise UserError(f"--consumes: got {args.consumes}, expected a positive number of img/s")
    if args.preset not in PRESETS:
        raise UserError(
            f"--preset: got {args.preset!r}{nearest(args.preset, PRESETS)}, expected {', '.join(PRESETS)}"
        )
    args.workers = [command.whole("--workers", text) for text in command.listed("--workers", args.workers)]
    if "encode" in parts and find_spec("diffusers") is None:
        raise UserError("--parts: encode needs diffusers, which is not installed; choose other parts")
    device = command.device(args.device)
    command.set_threads(args.threads)
    args.batch = args.batch or (256 if device.type == "cuda" else 8)
    line = shlex.join(["python", "bench/training.py", *argv])
    kept.rows = rows = RowFile(args.json, machine(device, line))
    measure: dict[str, Callable[[Request], None]] = {
        "loader": feed.loaders, "encode": feed.encoding, "step": looping.steps, "save": looping.saves,
    }  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="bench-", dir=args.scratch) as folder:
        request = Request(args, device, rows, Path(folder))
        for part in PARTS:
            if part in parts:
                measure[part](request)
    command.conclude(rows, None, lambda rows, path: False)
    return 0


def _parser() -> command.Parser:
    parser = command.Parser(prog="training", description="Measure what surrounds a training step.")
    parser.add_argument("--parts", default=",".join(PARTS), help="parts, comma-separated (default: all)")
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda or cuda:N")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--repeats", type=int, default=9, help="rounds of each measurement (default: 9)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="append the rows to this file")
    parser.add_argument(
        "--scratch", type=Path, metavar="DIR", help="where to write temporary data and checkpoints"
    )
    feeding = parser.add_argument_group("loader and encode")
    feeding.add_argument(
        "--workers", default="1,2,4,8", help="decoding threads, comma-separated (default: 1,2,4,8)"
    )
    feeding.add_argument(
        "--consumes", type=float, default=CONSUMES, metavar="IMG_PER_S",
        help=f"what a model consumes (default: {CONSUMES:.0f}, the limit of MDTv2-XL/2 on an H200)",
    )  # fmt: skip
    feeding.add_argument("--images", type=int, default=256, help="JPEG files to make (default: 256)")
    feeding.add_argument("--size", type=int, default=256, help="side of an image in pixels (default: 256)")
    feeding.add_argument("--vae", help="AutoencoderKL, as a folder or hub name (default: a tiny one)")
    looped = parser.add_argument_group("step and save")
    looped.add_argument("--preset", default="mdtv2-s2", help="training recipe (default: mdtv2-s2)")
    looped.add_argument("--batch", type=int, help="images per step (default: 256; on a CPU 8)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
