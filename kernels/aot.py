"""Compiling Triton kernels for GPUs that are not there, and reading what the machine code says.

Rooms list their kernels at the shapes they serve as :class:`Case`; ``bench/kernels.py`` compiles them all.
"""

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .launches import Entry

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")
"""A100, H100 and H200, B200; AMD's MI300."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One kernel at one shape.

    ``dtypes``: Triton's type name of every argument that is no constant (``*bf16``, ``i32``, ``fp32``).
    ``aligned``: arguments whose value divides by 16 at this shape, as Triton would see at launch.
    ``entry``: where ``tuned.json`` has its launch choice, if one can be measured.
    """

    kernel: Any
    label: str
    dtypes: Mapping[str, str]
    constants: Mapping[str, Any]
    aligned: frozenset[str] = field(default_factory=frozenset)
    num_warps: int = 4
    num_stages: int = 3
    entry: Entry | None = None


def compile_case(case: Case, arch: str) -> dict[str, int]:
    """Compile for ``arch``; registers, spills, shared memory and instruction counts by name.

    Raises what Triton raises where the kernel does not compile or does not fit.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = case.kernel.arg_names
    signature = {name: "constexpr" if name in case.constants else case.dtypes[name] for name in names}
    constants = {(names.index(name),): value for name, value in case.constants.items()}
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in case.aligned}
    amd = arch.startswith("gfx")
    target = GPUTarget("hip", arch, 64) if amd else GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    source = ASTSource(case.kernel, signature, constants, attributes)
    compiled = triton.compile(
        source, target=target, options={"num_warps": case.num_warps, "num_stages": case.num_stages}
    )
    read = _read_amdgcn(compiled.asm["amdgcn"]) if amd else _read_cubin(compiled.asm["cubin"])
    # Shared memory is asked for at launch: the binary itself does not tell.
    return read | {"shared_bytes": compiled.metadata.shared}


def _read_cubin(cubin: bytes) -> dict[str, int]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        (numbers,) = read_cubin(path).values()
    return numbers


def read_cubin(path: Path) -> dict[str, dict[str, int]]:
    """Registers, spills, stack, static shared memory and instruction counts of each kernel in a file."""
    usage, sass = (_cuobjdump(flag, path) for flag in ("-res-usage", "-sass"))
    found = re.findall(
        r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage, flags=re.MULTILINE
    )
    if not found:
        raise RuntimeError(f"cuobjdump says nothing of registers: {usage[:200]!r}")
    parts = re.split(r"Function : (\S+)", sass)
    code = dict(zip(parts[1::2], parts[2::2], strict=True))
    return {name: _numbers(code[name], *map(int, numbers)) for name, *numbers in found}


def _numbers(sass: str, registers: int, stack: int, shared: int, local: int) -> dict[str, int]:
    counts = {
        name: len(re.findall(pattern, sass))
        for name, pattern in {
            "HMMA": r"\bHMMA\b", "HGMMA": r"\bHGMMA\b", "UTCMMA": r"\bUTC\w*MMA\b", "FFMA": r"\bFFMA\b",
            "LDL": r"\bLDL\b", "STL": r"\bSTL\b",
            "LDG": r"\bLDG\b", "LDG.128": r"\bLDG\.\S*128", "LDGSTS": r"\bLDGSTS\b",
            "LDGSTS.128": r"\bLDGSTS\S*\.128", "STG": r"\bSTG\b", "STG.128": r"\bSTG\S*\.128",
        }.items()
    }  # fmt: skip
    # Local memory is where registers go that do not fit; loads and stores of it tell of spills too.
    spills = local + 4 * 32 * (counts["LDL"] + counts["STL"])
    return {
        "registers": registers, "stack_bytes": stack, "shared_bytes": shared, "spill_bytes": spills, **counts
    }  # fmt: skip


def _cuobjdump(flag: str, path: Path) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([tool, flag, path], capture_output=True, text=True, check=True).stdout


def _read_amdgcn(text: str) -> dict[str, int]:
    def number(key: str) -> int:
        found = re.search(rf"\.{key}:\s+(\d+)", text)
        if found is None:
            raise RuntimeError(f"the AMD assembly does not say {key}")
        return int(found[1])

    return {
        "registers": number("vgpr_count"),
        "spill_bytes": 4 * (number("vgpr_spill_count") + number("sgpr_spill_count")),
        "stack_bytes": number("private_segment_fixed_size"),
        "MFMA": len(re.findall(r"\bv_mfma", text)),
    }
