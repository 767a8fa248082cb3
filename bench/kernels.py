"""Time every op on this machine, or check the machine code of every kernel for GPUs it need not have.

    python bench/kernels.py                        every op: time and share of the roof for each provider
    python bench/kernels.py --model XL --batch 32 --dtype bfloat16 --ops ln_modulate --json rows.jsonl
    python bench/kernels.py --aot                  a table; exit code 1 if a kernel spills or does not fit
    python bench/kernels.py --aot --arch sm_90 --json rows.jsonl

Timing compares, in interleaved rounds, ``fast`` (our op as it dispatches on this machine), ``eager`` (the
reference.py of its room) and ``compile`` (that reference under torch.compile). The roof is the time of a copy
of the same number of bytes in the same rounds or, if longer, of the matmul FLOPs at the best rate of the run.
Optimiser steps cover the tensors of the whole model and are compared with separate sweeps for clipping,
update and moving average (``optimizers.py``). On a CPU the default is the smallest size, which takes under a
minute.

``--aot`` compiles every kernel for every shape class it serves, for A100 (sm_80), H100 and H200 (sm_90), B200
(sm_100) and MI300 (gfx942).
"""

import argparse
import shlex
import sys
from collections.abc import Sequence

import torch

import aot
import command
import ops
import optimizers
import plots
import points
from mdt_fast.errors import UserError, nearest
from mdt_fast.kernels.aot import ARCHITECTURES
from rows import RowFile, machine

TIME_LIMITS = {"cpu": 50.0, "cuda": 225.0}


def main(argv: Sequence[str] | None = None) -> int:
    """Time the ops or compile their kernels. Returns 0; 1 if nothing was measured, or if a kernel spills or
    does not compile; 2 after a user error; 130 after Ctrl-C."""
    argv = list(sys.argv[1:] if argv is None else argv)
    return command.guarded("kernels", lambda kept: _main(argv, kept))


def _main(argv: list[str], kept: command.Kept) -> int:
    parser = _parser()
    args = parser.parse_args(argv)
    given = [name for name, value in vars(args).items() if value != parser.get_default(name)]
    line = shlex.join(["python", "bench/kernels.py", *argv])
    if args.aot:
        if other := [name for name in given if name not in ("aot", "arch", "json")]:
            raise UserError(f"--{other[0].replace('_', '-')}: not with --aot, which times nothing")
        architectures = args.arch.split(",")
        for arch in architectures:
            if arch not in ARCHITECTURES:
                known = ", ".join(ARCHITECTURES)
                raise UserError(f"--arch: unknown {arch!r}{nearest(arch, ARCHITECTURES)}; known: {known}")
        kept.rows = rows = RowFile(args.json, machine(torch.device("cpu"), line))
        return aot.compile_all(architectures, rows)
    if "arch" in given:
        raise UserError("--arch: only with --aot; timing uses the device of this machine")
    return time_ops(args, line, kept)


def time_ops(args: argparse.Namespace, line: str, kept: command.Kept) -> int:
    """Time the requested ops. Returns 1 if nothing was measured, otherwise 0."""
    request = points.Request(args, ops.PROVIDERS, time_limits=TIME_LIMITS, not_on_cpu=("compile",))
    on_cpu = request.device.type == "cpu"
    models = command.names("--model", args.model or ("S" if on_cpu else "XL"), tuple(ops.WIDTHS))
    B = command.whole("--batch", args.batch or ("2" if on_cpu else "32"))
    known = (*ops.cases("S", 1), *optimizers.PROVIDERS)
    asked = command.names("--ops", args.ops, known) if args.ops is not None else list(known)
    chosen = [
        cases[name].point(mode, dtype)
        for cases in (ops.cases(model, B) for model in models)
        for name in asked
        for dtype in request.dtypes
        for mode in request.modes
        if name in cases and mode in cases[name].modes
    ]
    if "fwd" in request.modes:
        chosen += [
            optimizers.point(name, model)
            for model in models
            for name in asked
            if name in optimizers.PROVIDERS
        ]
    if not chosen:
        raise UserError(f"--mode: {', '.join(asked)} has no backward pass, expected fwd")
    kept.rows = rows = RowFile(args.json, machine(request.device, line))
    if args.plot is not None:
        plots.check_target(args.plot)
    if on_cpu and args.model is None and args.batch is None:
        print("model S, batch 2: the smallest sizes, as this is a CPU (published: --model XL --batch 32)")
    if on_cpu and not request.asked:
        print("providers fast, eager: compile would take minutes more (--providers fast,eager,compile)")
    measured = points.measure(chosen, request, rows)
    command.conclude(rows, args.plot, plots.draw_kernels)
    return 0 if measured else 1


def _parser() -> command.Parser:
    parser = command.Parser(
        prog="kernels", description="Time every op, or compile every Triton kernel (--aot)."
    )
    parser.add_argument(
        "--model",
        help=f"model widths, comma-separated, from {', '.join(ops.WIDTHS)} (default: XL; on a CPU S)",
    )
    parser.add_argument("--batch", help="batch size (default: 32; on a CPU 2)")
    parser.add_argument("--ops", help="ops to time, comma-separated (default: all)")
    points.add_options(parser, ops.PROVIDERS)
    parser.add_argument(
        "--aot", action="store_true", help="compile for GPUs this machine need not have; times nothing"
    )
    parser.add_argument(
        "--arch",
        default=",".join(ARCHITECTURES),
        help="with --aot: architectures, comma-separated (default: all)",
    )
    command.add_output_options(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
