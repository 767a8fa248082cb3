"""Compile the CUDA kernels of ``csrc/`` with nvcc, for GPUs this machine need not have."""

import os
import re
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch

from mdt_fast.kernels.aot import read_cubins

CSRC = Path(__file__).resolve().parents[1] / "csrc"
SOURCES = ("mask_plan.cu", "optim.cu")
FLAGS = ("-std=c++17", "-O3", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020b000000000000")


@cache
def nvcc() -> Path | None:
    """CUDA's compiler: from ``CUDA_HOME``, ``/usr/local/cuda``, pip packages or the path, in this order."""
    packages = sorted(Path(torch.__file__).parents[1].glob("nvidia/cu*"))
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda", *packages]
    for home in homes:
        if home and (compiler := Path(home, "bin", "nvcc")).exists():
            return compiler
    on_path = shutil.which("nvcc")
    return Path(on_path) if on_path else None


def compile_source(source: str, arch: str) -> dict[str, dict[str, float]]:
    """The numbers of each kernel of ``csrc/<source>`` for ``arch``, by name. Raises ``RuntimeError`` if
    compilation fails."""
    compiler = nvcc()
    if compiler is None:
        raise RuntimeError("nvcc was not found (set CUDA_HOME, or pip install nvidia-cuda-nvcc)")
    include = [Path(torch.__file__).parent / "include", *compiler.resolve().parents[1].glob("include/cccl")]
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernels.cubin"
        options = [*FLAGS, f"-arch={arch}", *(f"-I{path}" for path in include)]
        command = [str(compiler), "-cubin", *options, str(CSRC / source), "-o", str(cubin)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"nvcc: {(done.stderr or done.stdout).strip()}")
        (kernels,) = read_cubins([cubin])
        return {_short(name): dict(numbers) for name, numbers in kernels.items()}


def _short(mangled: str) -> str:
    """A short form of a mangled name, such as ``mask_plan_kernel<f, 128, 2>``."""
    name, arguments = re.search(r"(?<=\d)([a-z_]+_kernel)(?:I(.*?)EE?v)?", mangled).groups()  # type: ignore[union-attr]
    values = re.findall(r"^[df](?=L)|(?<=L[ib])\d+", arguments or "")
    return f"{name}<{', '.join(values)}>" if values else name
