"""Package locations and the build of ``csrc/``; everything else is in ``pyproject.toml``.

The kernel packages are in ``kernels/`` at the top of the repository and are installed as
``mdt_fast.kernels``, because a top-level package called ``kernels`` would collide with a published one.

The native ops become two libraries, ``_cpu`` and ``_cuda``, on torch's stable ABI (2.11), so that one binary
serves later versions of torch and any Python. They only add speed: if they cannot be built, the package
installs without them and says why, and PyTorch serves. Environment variables:

- ``MDT_FAST_CUDA``: ``auto`` (the default: if there are nvcc and a CUDA build of torch), ``1`` (build or
  fail), ``0`` (do not build);
- ``TORCH_CUDA_ARCH_LIST``: GPUs to build for (default: the one in this machine, or 8.0, 9.0 and 10.0);
- ``MAX_JOBS``, ``CXX``, ``CUDA_HOME``: as for every extension of torch.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import setuptools
from setuptools import Extension, find_packages, setup

# Only `pip install --no-build-isolation` can find an older setuptools, which would fail on the licence field.
if int(setuptools.__version__.split(".")[0]) < 77:
    raise SystemExit(
        f"mdt-fast is built with setuptools 77 or later, found {setuptools.__version__}: "
        "pip install --upgrade 'setuptools>=77'"
    )

TARGET = ["-DTORCH_TARGET_VERSION=0x020b000000000000"]
# No -march: the inner loops are dispatched by processor at run time (targets.h). No fused multiply-add except
# where products request it, so that all processors give the same bits.
CXX_FLAGS = [
    *TARGET,
    "-std=c++17",
    "-O3",
    "-g0",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=off",
]
NVCC_FLAGS = [*TARGET, "-DUSE_CUDA", "-std=c++17", "-O3"]
LIBS = ("lib64", "lib", "lib/x86_64-linux-gnu")
ARCHITECTURES = {"sm_80": "8.0", "sm_90": "9.0", "sm_100": "10.0"}
CUDA = os.environ.get("MDT_FAST_CUDA", "auto")
if CUDA not in ("auto", "0", "1"):
    raise SystemExit(f"MDT_FAST_CUDA: got {CUDA!r}, expected auto, 0 or 1")


def say(line: str) -> None:
    print(f"mdt-fast: {line}", file=sys.stderr)


def find_torch():
    """torch and its extension tools. pip's isolated build hides an installed torch, so also search there."""
    sys.path.append(sysconfig.get_path("platlib"))
    try:
        import torch
        from torch.utils import cpp_extension
    except ImportError as error:
        if CUDA == "1":
            raise SystemExit(f"MDT_FAST_CUDA=1: torch cannot be imported: {error}") from None
        say(f"no native ops: torch cannot be imported here ({error}); with torch installed, try "
            "pip install --no-build-isolation")  # fmt: skip
        return None, None
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 11):
        say(f"no native ops: they need torch 2.11, found {torch.__version__}")
        return None, None
    return torch, cpp_extension


def cuda_home(torch, cpp_extension) -> Path | None:
    """The folder of the CUDA toolkit, if CUDA ops are to be built."""
    if CUDA == "0":
        return None
    on_path = shutil.which("nvcc")
    named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    homes = [named] if named else [
        cpp_extension.CUDA_HOME, on_path and Path(on_path).resolve().parents[1], "/usr/local/cuda"
    ]  # fmt: skip
    homes = [Path(home) for home in homes if home and (Path(home) / "bin" / "nvcc").exists()]
    homes = [home for home in homes if any((home / lib / "libcudart_static.a").exists() for lib in LIBS)]
    if not homes:
        missing = f"no nvcc with its static runtime in {named or 'PATH or /usr/local/cuda'}"
        if CUDA == "1":
            raise SystemExit(f"MDT_FAST_CUDA=1: {missing}; set CUDA_HOME")
        say(f"no CUDA ops: {missing}")
        return None
    if CUDA == "auto" and torch.version.cuda is None:
        say("no CUDA ops: this torch is built for the CPU (MDT_FAST_CUDA=1 builds them all the same)")
        return None
    return homes[0]


def cpu_extension(cpp_extension) -> Extension:
    return Extension(
        "mdt_fast.kernels._cpu",
        sorted(str(path) for path in Path("csrc").glob("*.cpp")),
        depends=HEADERS,
        include_dirs=cpp_extension.include_paths(),
        library_dirs=cpp_extension.library_paths(),
        libraries=["torch_cpu", "c10"],
        extra_compile_args=CXX_FLAGS,
        language="c++",
        py_limited_api=True,
        optional=True,
    )


def cuda_extension(cpp_extension, home: Path) -> Extension:
    cpp_extension.CUDA_HOME = str(home)
    if "TORCH_CUDA_ARCH_LIST" not in os.environ and not torch.cuda.is_available():
        known = subprocess.check_output([home / "bin" / "nvcc", "--list-gpu-code"], text=True).split()
        served = [number for name, number in ARCHITECTURES.items() if name in known]
        os.environ["TORCH_CUDA_ARCH_LIST"] = ";".join(served) + "+PTX"
    include = [home / "include", home / "include" / "cccl"]
    return Extension(
        "mdt_fast.kernels._cuda",
        ["csrc/mask_plan.cu", "csrc/optim.cu"],
        depends=HEADERS,
        include_dirs=[*cpp_extension.include_paths(), *map(str, include)],
        library_dirs=[*cpp_extension.library_paths(), *(str(home / lib) for lib in LIBS)],
        libraries=["torch_cpu", "c10", "cudart_static", "dl", "rt", "pthread"],
        extra_compile_args={"cxx": CXX_FLAGS, "nvcc": NVCC_FLAGS},
        extra_link_args=["-Wl,--no-as-needed", "-ltorch_cuda"],
        language="c++",
        py_limited_api=True,
        optional=CUDA != "1",
    )


HEADERS = sorted(str(path) for path in Path("csrc").glob("*.h"))
torch, cpp_extension = find_torch()
extensions, commands = [], {}

if torch is not None:
    extensions.append(cpu_extension(cpp_extension))
    if home := cuda_home(torch, cpp_extension):
        extensions.append(cuda_extension(cpp_extension, home))

    class BuildNative(cpp_extension.BuildExtension):
        """torch's builder, with ninja if installed. It notes and leaves out libraries that fail to build."""

        def build_extensions(self) -> None:
            try:
                super().build_extensions()
            except Exception as error:  # torch first asks the compiler for its version
                if not all(extension.optional for extension in self.extensions):
                    raise
                say(f"no native ops: they could not be built: {error}")

        def build_extension(self, extension: Extension) -> None:
            library = Path(self.get_ext_fullpath(extension.name))
            library.unlink(missing_ok=True)  # never keep an old library beside new sources
            if extension.name.endswith("_cuda") and torch.version.cuda is None:
                self._stand_in_for("torch_cuda", extension)
            try:
                super().build_extension(extension)
            except Exception as error:
                if not extension.optional:
                    raise
                say(f"no {extension.name}: it could not be built: {error}")

        def _stand_in_for(self, name: str, extension: Extension) -> None:
            """Build an empty library to link with, in place of one that only a CUDA build of torch has."""
            folder = Path(self.build_temp).resolve()
            folder.mkdir(parents=True, exist_ok=True)
            soname = f"lib{name}.so"
            compiler = self.compiler.compiler_cxx[0]
            command = [compiler, "-shared", "-x", "c++", os.devnull, f"-Wl,-soname,{soname}"]
            subprocess.check_call([*command, "-o", str(folder / soname)])
            extension.library_dirs.append(str(folder))

    commands = {"build_ext": BuildNative}

packages = find_packages(include=["mdt_fast", "mdt_fast.*"])
rooms = ["mdt_fast.kernels"] + [f"mdt_fast.kernels.{room}" for room in find_packages("kernels")]

setup(
    packages=packages + rooms,
    package_dir={"mdt_fast": "mdt_fast", "mdt_fast.kernels": "kernels"},
    package_data={
        "mdt_fast": ["py.typed"],
        **{room: ["README.md"] for room in rooms},
        "mdt_fast.kernels": ["README.md", "tuned.json"],
    },
    ext_modules=extensions,
    cmdclass=commands,
    options={"bdist_wheel": {"py_limited_api": "cp311"}} if extensions else {},
)
