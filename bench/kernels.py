"""The kernels' machine code: compiled here for GPUs that need not be here.

    python bench/kernels.py --aot                  a table; exit code 1 if a kernel spills or does not fit
    python bench/kernels.py --aot --arch sm_90 --json rows.jsonl

Every kernel is compiled at every shape class that it serves, for A100 (sm_80), H100 and H200 (sm_90), B200
(sm_100) and MI300 (gfx942). Timing on a GPU is not part of this version.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from mdt_fast.errors import UserError, nearest
from mdt_fast.kernels.aot import ARCHITECTURES, Case, compile_case
from rows import RowFile, machine

COLUMNS = {
    "registers": "registers",
    "spill_bytes": "spills B",
    "stack_bytes": "stack B",
    "shared_bytes": "shared",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Compile and print. Returns 0; 1 if a kernel spills or does not compile; 2 after a user's mistake."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        args = _parser().parse_args(argv)
        architectures = args.arch.split(",")
        for arch in architectures:
            if arch not in ARCHITECTURES:
                known = ", ".join(ARCHITECTURES)
                raise UserError(f"--arch: unknown {arch!r}{nearest(arch, ARCHITECTURES)}; known: {known}")
        rows = RowFile(
            args.json, machine(torch.device("cpu"), shlex.join(["python", "bench/kernels.py", *argv]))
        )
        return compile_all(architectures, rows)
    except UserError as error:
        print(f"kernels: error: {error}", file=sys.stderr)
        return 2


def compile_all(architectures: Sequence[str], rows: RowFile) -> int:
    """A table for each architecture. Returns 1 if any kernel spills or fails."""
    from mdt_fast.kernels.bias_gelu import aot as bias_gelu
    from mdt_fast.kernels.ln_modulate import aot as ln_modulate
    from mdt_fast.kernels.tokens import aot as tokens

    rooms = {"ln_modulate": ln_modulate, "bias_gelu": bias_gelu, "tokens": tokens}
    cases_of = {op: list(room.cases()) for op, room in rooms.items()}
    console = Console(width=max(120, Console().width))
    bad = number = 0
    for arch in architectures:
        table = Table(title=arch, header_style="bold", box=None)
        for name in ("kernel", "shape", "warps", *COLUMNS.values(), "wide loads", "wide stores"):
            table.add_column(name, justify="left" if name in ("kernel", "shape") else "right", no_wrap=True)
        for op, cases in cases_of.items():
            for case in cases:
                numbers = measure(case, op, arch, rows)
                number += 1
                bad += numbers is None or numbers["spill_bytes"] > 0
                table.add_row(_short(case), case.label, str(case.num_warps), *_cells(numbers))
        console.print(table)
    print(f"{number} compiled, {bad} of them spill or fail")
    return 1 if bad else 0


def measure(case: Case, op: str, arch: str, rows: RowFile) -> dict[str, int] | None:
    """Compile one kernel and write its rows; None (and a row that says why) where it does not compile."""
    common = {
        "bench": "aot", "op": op, "kernel": case.kernel.__name__, "arch": arch, "shape": case.label,
        "provider": "triton", "mode": "bwd" if "bwd" in case.kernel.__name__ else "fwd",
        "dtype": case.label.split()[-1], "switches": {"num_warps": case.num_warps},
    }  # fmt: skip
    try:
        numbers = compile_case(case, arch)
    except Exception as error:
        rows.add(**common, metric="failed", unit="", note=f"{type(error).__name__}: {error}"[:300])
        return None
    for metric, value in numbers.items():
        rows.add((None, value, None), **common, metric=metric, unit="B" if metric.endswith("bytes") else "1")
    return numbers


def _cells(numbers: dict[str, int] | None) -> list[str]:
    if numbers is None:
        return ["failed"]
    wide = [
        f"{numbers[f'{op}.128']} of {numbers[op]}" if f"{op}.128" in numbers else "" for op in ("LDG", "STG")
    ]
    return [*(str(numbers.get(key, "")) for key in COLUMNS), *wide]


def _short(case: Case) -> str:
    return case.kernel.__name__.removesuffix("_kernel")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Compile every Triton kernel and show its machine code's numbers."
    )
    parser.add_argument(
        "--aot", action="store_true", required=True, help="compile for GPUs that are not here"
    )
    parser.add_argument(
        "--arch", default=",".join(ARCHITECTURES), help="which, comma-separated (default: all)"
    )
    parser.add_argument("--json", type=Path, help="append rows to this file")
    return parser


if __name__ == "__main__":
    sys.exit(main())
