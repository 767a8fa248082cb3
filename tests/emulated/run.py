"""Run tests marked ``gpu`` without a GPU, with PyTorch's CUDA build (CONTRIBUTING.md, "The tests").

``python tests/emulated/run.py tests/test_gpu_sampling.py -k graph``: arguments are pytest's. It needs gcc, nm
and CUDA's headers. EMULATE_SECONDS=120 skips tests that take longer; EMULATE_COMPILE=1 also compiles Triton's
kernels. Values are a CPU's: this finds what fails before or between kernels (devices, captures, graphs,
launch code), not wrong kernels, and times mean nothing.

``--program bench/throughput.py --device cuda ...`` runs a program in place of pytest. With ``--idle`` kernels
do nothing at all, so that ``--idle bench/host.py`` times what the host does.
"""

import os
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
LIBRARIES = "libtorch_cuda.so", "libc10_cuda.so", "libtorch_python.so", "libtorch_cuda_linalg.so"
PREFIXES = "cuda", "__cuda", "cu", "cublas", "cudnn", "cusparse", "cusolver", "cufft", "curand", "nccl"
NOT = "cuFile", "cupti"
TRITON = (
    "cuInit", "cuCtxSetCurrent", "cuCtxSetLimit", "cuFuncSetAttribute", "cuFuncSetCacheConfig",
    "cuLaunchKernelEx", "cuTensorMapEncodeTiled",
)  # fmt: skip

START = """
import runpy, sys
from pathlib import Path
sys.argv = sys.argv[1:]
sys.path.insert(0, str(Path(sys.argv[0]).resolve().parent))
runpy.run_path(sys.argv[0], run_name="__main__")
"""
PROGRAM = f"import mdt_fast, pytorch; pytorch.replace_ours(){START}"
# cuDNN's answers decide what PyTorch does next, and there are none.
IDLE = f"import torch; torch.backends.cudnn.enabled = False{START}"


def nvidia() -> list[str]:
    """Where pip puts CUDA's parts."""
    found = find_spec("nvidia")
    return [*(found.submodule_search_locations or [])] if found else []


def build(torch: Path, folder: Path) -> Path:
    """Compile ``cuda.c`` and a stub for every other symbol that PyTorch needs: folder/libcuda.so.1."""
    needed: set[str] = set()
    for library in LIBRARIES:
        listed = subprocess.run(
            ["nm", "-D", "--undefined-only", torch / "lib" / library],
            capture_output=True,
            text=True,
            check=True,
        )
        needed |= {line.split()[-1].partition("@")[0] for line in listed.stdout.splitlines()}
    needed = {name for name in needed if name.startswith(PREFIXES) and not name.startswith(NOT)} | {*TRITON}
    homes = [Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")), *(Path(p, "cu13") for p in nvidia())]
    headers = "cuda.h", "crt/host_defines.h"
    include = next(
        (home / "include" for home in homes if all((home / "include" / h).exists() for h in headers)), None
    )
    if include is None:
        sys.exit("CUDA_HOME: no CUDA headers there (/usr/local/cuda if unset); install a CUDA toolkit")
    compiler = ["gcc", "-shared", "-fPIC", "-O1", "-w", f"-I{include}"]
    own, stubs, made = folder / "own.so", folder / "stubs.c", folder / "libcuda.so.1"
    subprocess.run([*compiler, HERE / "cuda.c", "-o", own], check=True)
    listed = subprocess.run(["nm", "-D", "--defined-only", own], capture_output=True, text=True, check=True)
    needed -= {line.split()[-1] for line in listed.stdout.splitlines()}
    stubs.write_text("".join(f"long {name}(void) {{ return 0; }}\n" for name in sorted(needed)))
    subprocess.run([*compiler, HERE / "cuda.c", stubs, "-o", made, "-Wl,-soname,libcuda.so.1"], check=True)
    (folder / "libcuda.so").symlink_to(made.name)
    return made


def main(arguments: list[str]) -> int:
    torch = find_spec("torch")
    if (
        torch is None
        or torch.origin is None
        or not Path(torch.origin).with_name("lib").joinpath(LIBRARIES[0]).exists()
    ):
        sys.exit('torch: needs a CUDA build (CONTRIBUTING.md, "The tests")')
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        made = build(Path(torch.origin).parent, folder)
        native = folder / "native"  # the CPU's ops alone: CUDA's bring a runtime of their own
        native.mkdir()
        for library in (ROOT / "kernels").glob("_cpu.*"):
            native.joinpath(library.name).symlink_to(library)
        paths = [str(HERE), str(ROOT), os.environ.get("PYTHONPATH", "")]
        environment = os.environ | {
            "LD_PRELOAD": str(made), "LD_LIBRARY_PATH": name, "TRITON_LIBCUDA_PATH": name,
            "MDT_FAST_NATIVE": str(native), "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        }  # fmt: skip
        command = ["-m", "pytest", "-p", "pytorch", "-p", "no:xdist", "-m", "gpu", *arguments]
        if arguments[:1] in (["--program"], ["--idle"]):
            command = ["-c", IDLE if arguments[0] == "--idle" else PROGRAM, *arguments[1:]]
        return subprocess.run([sys.executable, *command], env=environment, cwd=ROOT).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
