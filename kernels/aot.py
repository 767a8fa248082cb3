"""Compile Triton kernels for GPUs that this machine does not have, and read statistics from the machine code.

Each room lists its kernels at the shapes they serve as :class:`Case`; ``bench/kernels.py`` compiles
them all.
"""

import re
import subprocess
import tempfile
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

from .launches import Entry

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")
"""A100; H100 and H200; B200; AMD's MI300."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One kernel at one shape.

    ``dtypes``: Triton's type name of every argument that is not a constant (``*bf16``, ``i32``, ``fp32``).
    ``aligned``: the arguments that are multiples of 16 at this shape, as Triton would see at launch.
    ``entry``: its entry in ``tuned.json``, if its launch choice can be tuned.
    """

    kernel: Any
    label: str
    dtypes: Mapping[str, str]
    constants: Mapping[str, Any]
    aligned: frozenset[str] = field(default_factory=frozenset)
    num_warps: int = 4
    num_stages: int = 3
    entry: Entry | None = None


def compile_cases(cases: Sequence[Case], arch: str) -> list[dict[str, int] | Exception]:
    """Compile each case for ``arch``; returns its registers, spills, shared memory and instruction counts.

    A kernel that does not compile or does not fit yields Triton's exception instead. Many cases per call cost
    less than one at a time, because the disassembler takes longer to start than to read.
    """
    compiled = [_compile(case, arch) for case in cases]
    good = [one for one in compiled if not isinstance(one, Exception)]
    if not good:
        return list(compiled)
    if arch.startswith("gfx"):
        read = [_read_amdgcn(one.asm["amdgcn"]) for one in good]
    else:
        with tempfile.TemporaryDirectory() as folder:
            paths = [Path(folder) / f"{i}.cubin" for i in range(len(good))]
            for path, one in zip(paths, good, strict=True):
                path.write_bytes(one.asm["cubin"])
            read = [numbers for kernels in read_cubins(paths) for numbers in kernels.values()]
    # Shared memory is requested at launch, so the binary itself does not say how much.
    full = [numbers | {"shared_bytes": one.metadata.shared} for numbers, one in zip(read, good, strict=True)]
    numbers = iter(full)
    return [one if isinstance(one, Exception) else next(numbers) for one in compiled]


def _compile(case: Case, arch: str) -> Any:
    """Triton's compiled kernel, or the exception it raised."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = case.kernel.arg_names
    signature = {name: "constexpr" if name in case.constants else case.dtypes[name] for name in names}
    constants = {(names.index(name),): value for name, value in case.constants.items()}
    # Sorted, because Triton's cache key depends on the order, and a set's order differs between processes.
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in sorted(case.aligned)}
    amd = arch.startswith("gfx")
    target = GPUTarget("hip", arch, 64) if amd else GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    source = ASTSource(case.kernel, signature, constants, attributes)
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    try:
        return triton.compile(source, target=target, options=options)
    except Exception as error:
        return error


def read_cubins(paths: Sequence[Path]) -> list[dict[str, dict[str, int]]]:
    """Registers, spills, stack, static shared memory and instruction counts of each kernel in each file.

    All files must be for the same architecture.
    """
    usage: list[dict[str, tuple[int, ...]]] = []
    code: dict[tuple[int, str], bytes] = {}
    arch = ""
    for i, path in enumerate(paths):
        said = _tool("cuobjdump", "-res-usage", path.resolve())
        found = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", said)
        if not found:
            raise RuntimeError(f"cuobjdump says nothing of registers: {said[:200]!r}")
        usage.append({name: tuple(map(int, numbers)) for name, *numbers in found})
        with tempfile.TemporaryDirectory() as folder:
            _tool("cuobjdump", "-xtext", "all", path.resolve(), cwd=folder)
            for file in Path(folder).iterdir():
                name, arch = file.name.removeprefix(f"{path.stem}-").removesuffix(".elf.bin").rsplit(".", 1)
                code[i, name] = file.read_bytes()
    sass = dict(zip(code, _disassemble(list(code.values()), arch), strict=True))
    return [
        {name: _numbers(sass[i, name], *numbers) for name, numbers in kernels.items()}
        for i, kernels in enumerate(usage)
    ]


def _disassemble(binaries: Sequence[bytes], arch: str) -> list[str]:
    """The instructions of each binary, one per line, from one run over all binaries concatenated."""
    ends = list(accumulate(map(len, binaries)))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "all.bin"
        path.write_bytes(b"".join(binaries))
        said = _tool("nvdisasm", "-b", arch.replace("sm_", "SM"), path)
    lines: list[list[str]] = [[] for _ in binaries]
    for address, instruction in re.findall(r"^\s*/\*([0-9a-f]{4,})\*/(.*)", said, flags=re.MULTILINE):
        lines[bisect_right(ends, int(address, 16))].append(instruction)
    return ["\n".join(own) for own in lines]


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
    # Registers spill to local memory, so loads and stores of it also indicate spills.
    spills = local + 4 * 32 * (counts["LDL"] + counts["STL"])
    return {
        "registers": registers, "stack_bytes": stack, "shared_bytes": shared, "spill_bytes": spills,
        "unset_registers": len(unset_registers(sass)) if counts["HGMMA"] else 0, **counts,
    }  # fmt: skip


UNIFORM_RESULT = re.compile(
    r"(?:U(?!ISETP|PLOP3|BLKCP|TMA|CGABAR)\w+|R2UR|S2UR|VOTEU|REDUX|CS2UR)(?:\.\w+)*$"
)


def unset_registers(sass: str) -> list[str]:
    """Hopper instructions that read a uniform register (UR) which no instruction before them has written.

    ptxas 12.8 generates such code for some ``wgmma`` whose operand in shared memory is not filled by a
    pipelined load. The descriptor is then whatever the register held. This was seen on an H100, as an
    occasional illegal memory access.
    """
    written: set[int] = set()
    found = []
    for line in sass.splitlines():
        instruction = re.sub(r"^@!?U?P\w+\s+", "", line.split(";")[0].strip())
        name, _, rest = instruction.partition(" ")
        operands = [text.strip() for text in rest.split(",")]
        target = next((i for i, text in enumerate(operands) if not re.fullmatch(r"!?U?P(T|\d+)", text)), 0)
        result = re.fullmatch(r"UR(\d+)", operands[target]) if UNIFORM_RESULT.match(name) else None
        read: set[int] = set()
        for i, text in enumerate(operands):
            if result is not None and i == target:
                continue
            if descriptor := re.search(r"gdesc\[UR(\d+)\]", text):
                # Four registers: A's descriptor (not read if A is in registers) and B's.
                first, a_in_registers = int(descriptor[1]), i == 2
                read |= set(range(first + 2 * a_in_registers, first + 4))
                continue
            for number, pair in re.findall(r"\bUR(\d+)(\.64)?", re.sub(r"desc\[UR(\d+)\]", r"UR\1.64", text)):
                read |= {int(number), int(number) + bool(pair)}
        if read - written:
            found.append(instruction)
        if result is not None:
            first, wide = int(result[1]), 4 if ".128" in name else 2 if re.search(r"\.(64|WIDE)", name) else 1
            written |= set(range(first, first + wide))
    return found


def _tool(name: str, *arguments: str | Path, cwd: str | None = None) -> str:
    """The output of one of the tools that come with Triton."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([tool, *arguments], capture_output=True, text=True, check=True, cwd=cwd).stdout


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
