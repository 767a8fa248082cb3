"""Check the kernels' machine code for GPUs this machine need not have: a table and rows per architecture."""

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from functools import cache
from importlib import import_module
from multiprocessing import get_context

from rich.console import Console
from rich.table import Table

import aot_csrc
from mdt_fast.kernels.aot import Case, compile_cases
from rows import RowFile

ROOMS = (
    "ln_modulate", "bias_gelu", "sums", "float8", "tokens", "patch_embed", "rel_attention", "cfg_step",
)  # fmt: skip
"""The rooms that list kernels in an ``aot.py``."""

CHUNK = 16
"""How many kernels a process compiles and disassembles at once."""
COLUMNS = {
    "registers": "registers",
    "spill_bytes": "spills B",
    "unset_registers": "unset",
    "stack_bytes": "stack B",
    "shared_bytes": "shared B",
    "occupancy": "occupancy",
}
MATRIX = ("HMMA", "HGMMA", "UTCMMA", "MFMA")
# Per multiprocessor; each block reserves another 1 KiB. All of them have 64 warps and 65536 registers.
SHARED_BYTES = {"sm_80": 164 * 1024, "sm_90": 228 * 1024, "sm_100": 228 * 1024}

Outcome = dict[str, float] | str


def compile_all(architectures: Sequence[str], rows: RowFile) -> int:
    """Print a table for each architecture. Returns 1 if any kernel is bad (:func:`is_bad`) or fails."""
    console = Console(width=max(170, Console().width))
    bad = number = 0
    # Spawn: forking a process that has threads may hang.
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        native = {arch: _start_csrc(pool, arch) for arch in architectures}
        triton = {arch: _start(pool, arch) for arch in architectures}
        for arch in architectures:
            table = _table(arch)
            outcomes = (outcome for chunk in triton[arch] for outcome in chunk.result())
            for (op, case), outcome in zip(_cases(arch), outcomes, strict=True):
                _record(case, op, arch, outcome, rows)
                number += 1
                bad += isinstance(outcome, str) or is_bad(outcome)
                name = case.kernel.__name__.removesuffix("_kernel")
                table.add_row(name, case.label, str(case.num_warps), *_cells(outcome))
            for name, numbers in _csrc(arch, native[arch], rows):
                number += 1
                bad += isinstance(numbers, str) or is_bad(numbers)
                table.add_row(name, "csrc", "", *_cells(numbers))
            console.print(table)
        if aot_csrc.nvcc() is None:
            print("the kernels of csrc/ were left out: nvcc was not found")
    print(f"{number} compiled, {bad} of them spill, read what was never written, or fail")
    return 1 if bad else 0


def is_bad(numbers: Mapping[str, float]) -> bool:
    """Whether a kernel spills, or reads uniform registers that nothing has written."""
    return numbers["spill_bytes"] > 0 or numbers.get("unset_registers", 0) > 0


@cache
def _cases(arch: str) -> list[tuple[str, Case]]:
    """Every (room, kernel)."""
    return [(op, case) for op in ROOMS for case in import_module(f"mdt_fast.kernels.{op}.aot").cases(arch)]


def _start(pool: ProcessPoolExecutor, arch: str) -> list[Future[list[Outcome]]]:
    return [pool.submit(_compile, arch, first) for first in range(0, len(_cases(arch)), CHUNK)]


def _compile(arch: str, first: int) -> list[Outcome]:
    """The numbers of each kernel of a chunk, or the reason why it does not compile."""
    outcomes: list[Outcome] = []
    cases = [case for _, case in _cases(arch)[first : first + CHUNK]]
    for case, numbers in zip(cases, compile_cases(cases, arch), strict=True):
        if isinstance(numbers, Exception):
            outcomes.append(f"{type(numbers).__name__}: {numbers}")
        elif arch in SHARED_BYTES:
            share = occupancy(numbers, case.num_warps, SHARED_BYTES[arch])
            outcomes.append(numbers | {"occupancy": share})
        else:
            outcomes.append(dict(numbers))
    return outcomes


def _start_csrc(pool: ProcessPoolExecutor, arch: str) -> dict[str, Future[dict[str, dict[str, float]]]]:
    """Start compiling the CUDA kernels of ``csrc/``, file by file, if nvcc is available."""
    if aot_csrc.nvcc() is None or not arch.startswith("sm_"):
        return {}
    return {source: pool.submit(aot_csrc.compile_source, source, arch) for source in aot_csrc.SOURCES}


def _csrc(
    arch: str, compiled: dict[str, Future[dict[str, dict[str, float]]]], rows: RowFile
) -> list[tuple[str, Outcome]]:
    """Write the rows of the kernels of ``csrc/`` and return their numbers for the table."""
    found: list[tuple[str, Outcome]] = []
    for source, future in compiled.items():
        common = {"bench": "aot", "op": source.removesuffix(".cu"), "arch": arch, "provider": "csrc",
                  "mode": "fwd", "dtype": "fp32", "shape": "", "switches": {}}  # fmt: skip
        try:
            kernels = future.result()
        except RuntimeError as error:
            found.append((source, str(error)))
            rows.add(**common, kernel=source, metric="failed", unit="", note=str(error)[:300])
            continue
        for name, numbers in kernels.items():
            found.append((name, numbers))
            for metric, value in numbers.items():
                unit = "B" if metric.endswith("bytes") else "1"
                rows.add((None, value, None), **common, kernel=name, metric=metric, unit=unit)
    return found


def occupancy(numbers: dict[str, int], num_warps: int, shared_bytes: int) -> float:
    """The largest share of a multiprocessor's 64 warps that registers and shared memory leave room for."""
    registers = -(-numbers["registers"] // 8) * 8 * 32 * num_warps
    blocks = min(64 // num_warps, 65536 // registers, shared_bytes // (numbers["shared_bytes"] + 1024), 32)
    return blocks * num_warps / 64


def _record(case: Case, op: str, arch: str, outcome: Outcome, rows: RowFile) -> None:
    common = {
        "bench": "aot", "op": op, "kernel": case.kernel.__name__, "arch": arch, "shape": case.label,
        "provider": "triton", "mode": "bwd" if "bwd" in case.kernel.__name__ else "fwd",
        "dtype": case.label.split()[-1],
        "switches": {"num_warps": case.num_warps, "num_stages": case.num_stages},
    }  # fmt: skip
    if isinstance(outcome, str):
        rows.add(**common, metric="failed", unit="", note=outcome[:300])
        return
    for metric, value in outcome.items():
        rows.add((None, value, None), **common, metric=metric, unit="B" if metric.endswith("bytes") else "1")


def _table(arch: str) -> Table:
    table = Table(title=arch, header_style="bold", box=None)
    wide = ("wide loads", "wide stores", "local loads, stores", "matrix")
    for name in ("kernel", "shape", "warps", *COLUMNS.values(), *wide):
        table.add_column(name, justify="left" if name in ("kernel", "shape") else "right", no_wrap=True)
    return table


def _cells(outcome: Outcome) -> list[str]:
    if isinstance(outcome, str):
        return [f"failed: {outcome.splitlines()[0][:80]}"]
    cells = []
    for key in COLUMNS:
        value = outcome.get(key)
        cells.append("" if value is None else f"{value:.0%}" if key == "occupancy" else f"{value:g}")
    if "LDG" not in outcome:
        cells += ["", "", ""]
    else:
        loads = outcome["LDG"] + outcome["LDGSTS"], outcome["LDG.128"] + outcome["LDGSTS.128"]
        cells += [
            f"{loads[1]:g} of {loads[0]:g}",
            f"{outcome['STG.128']:g} of {outcome['STG']:g}",
            f"{outcome['LDL']:g}, {outcome['STL']:g}",
        ]
    matrix = [f"{outcome[kind]:g} {kind}" for kind in MATRIX if outcome.get(kind)]
    return [*cells, ", ".join(matrix)]
