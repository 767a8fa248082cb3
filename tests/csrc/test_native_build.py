"""How ``csrc/`` is built and found, with and without a compiler or torch; and what it reports."""

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from mdt_fast.kernels.linear.op import of_intel
from mdt_fast.kernels.native import MISSING, library

ROOT = Path(__file__).parents[2]
SOURCES = ["mdt_fast", "kernels", "csrc", "setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"]
SETTINGS = ("MDT_FAST_CUDA", "TORCH_CUDA_ARCH_LIST", "MDT_FAST_NATIVE", "TRITON_INTERPRET")

pytestmark = pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return copied(tmp_path)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """Sources with the CPU's library built, which takes a quarter of a minute, and what the build said."""
    source = copied(tmp_path_factory.mktemp("built"))
    return source, build(source, MDT_FAST_CUDA="0")


def copied(folder: Path) -> Path:
    """A copy of the sources that the package is built from, with nothing built."""
    ignore = shutil.ignore_patterns("__pycache__", "*.so")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / "source" / name, ignore=ignore)
        elif (ROOT / name).exists():
            shutil.copy(ROOT / name, folder / "source" / name)
    return folder / "source"


def build(source: Path, wheel: str = "wheel", **environment: str) -> subprocess.CompletedProcess[str]:
    """``pip wheel`` without the network, which builds as ``pip install --no-build-isolation`` does."""
    try:  # looking for the module instead would bring Python's own distutils into this process
        importlib.metadata.version("pip")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("needs pip to build a wheel")
    env = {name: value for name, value in os.environ.items() if name not in SETTINGS} | environment
    command = [sys.executable, "-m", "pip", "wheel", "-v", "--no-deps", "--no-build-isolation", "--no-index"]
    command += ["-w", str(source.parent / wheel), str(source)]
    return subprocess.run(command, capture_output=True, text=True, env=env)


def libraries(source: Path, wheel: str = "wheel") -> list[str]:
    (file,) = (source.parent / wheel).glob("*.whl")
    names = zipfile.ZipFile(file).namelist()
    return [name for name in names if name.endswith(".so")]


def run(code: str, **environment: str) -> str:
    env = os.environ | environment
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True
    ).stdout


def test_this_checkout_has_the_cpu_ops() -> None:
    """Set-up builds them; without a compiler they would be missing, and all their tests skipped."""
    assert library("cpu"), MISSING["cpu"]


@pytest.mark.slow
def test_one_binary_for_every_python(built: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    source, done = built
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = (source.parent / "wheel").glob("*.whl")
    assert "-cp311-abi3-" in wheel.name
    assert libraries(source) == ["mdt_fast/kernels/_cpu.abi3.so"]


def test_without_a_compiler(source: Path) -> None:
    done = build(source, CXX="/nowhere/c++", CC="/nowhere/cc", MDT_FAST_CUDA="0")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "could not be built" in done.stdout + done.stderr
    assert libraries(source) == []


def test_a_compiler_that_fails(source: Path) -> None:
    for file in (source / "csrc").glob("*.cpp"):  # one would do, after the others have compiled
        file.write_text("#error this compiler is too old\n")
    done = build(source, MDT_FAST_CUDA="0")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no mdt_fast.kernels._cpu: it could not be built" in done.stdout + done.stderr
    assert libraries(source) == []


def test_without_torch(source: Path, tmp_path: Path) -> None:
    (tmp_path / "hidden" / "torch").mkdir(parents=True)
    (tmp_path / "hidden" / "torch" / "__init__.py").write_text("raise ImportError('hidden from this test')")
    done = build(source, PYTHONPATH=str(tmp_path / "hidden"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no native ops: torch cannot be imported here (hidden from this test)" in done.stdout + done.stderr
    assert libraries(source) == []
    assert build(source, PYTHONPATH=str(tmp_path / "hidden"), MDT_FAST_CUDA="1").returncode != 0


def test_settings_are_checked(source: Path, tmp_path: Path) -> None:
    done = build(source, MDT_FAST_CUDA="yes")
    assert done.returncode != 0
    assert "MDT_FAST_CUDA: got 'yes', expected auto, 0 or 1" in done.stdout + done.stderr
    done = build(source, MDT_FAST_CUDA="1", CUDA_HOME=str(tmp_path))
    assert done.returncode != 0
    assert f"MDT_FAST_CUDA=1: no nvcc with its static runtime in {tmp_path}" in done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.skipif(not Path("/usr/local/cuda/bin/nvcc").exists(), reason="needs CUDA in /usr/local/cuda")
def test_cuda_ops_without_a_gpu(built: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    """Ninja finds the objects of the CPU's library as they should be, and compiles the rest."""
    source, _ = built
    done = build(source, "cuda", MDT_FAST_CUDA="1", TORCH_CUDA_ARCH_LIST="9.0")
    assert done.returncode == 0, done.stdout + done.stderr
    assert libraries(source, "cuda") == ["mdt_fast/kernels/_cpu.abi3.so", "mdt_fast/kernels/_cuda.abi3.so"]
    (wheel,) = (source.parent / "cuda").glob("*.whl")
    content = zipfile.ZipFile(wheel).read("mdt_fast/kernels/_cuda.abi3.so")
    assert b"libtorch_cuda.so" in content
    assert b"libcudart.so" not in content  # linked statically


def test_the_ops_can_be_turned_off() -> None:
    code = (
        "import torch; from mdt_fast.kernels import backends, mask_plan, native\n"
        "print(native.MISSING['cpu']); print(mask_plan(torch.tensor([[.3, .1, .2]]), 2).ids_keep.tolist())\n"
        "print([b.backend for b in backends() if b.op == 'mask_plan'])"
    )
    out = run(code, MDT_FAST_NATIVE="0").splitlines()
    assert out[0] == "turned off by MDT_FAST_NATIVE=0"
    assert out[1:] == ["[[1, 2]]", "['pytorch']"]


def test_a_damaged_library_is_told_of(tmp_path: Path) -> None:
    (tmp_path / "_cpu.abi3.so").write_bytes(b"\x7fELF and no more")
    code = (
        "import torch; from mdt_fast.kernels import mask_plan, native; print(native.MISSING['cpu'])\n"
        "print(mask_plan(torch.tensor([[.3, .1, .2]]), 2).ids_keep.tolist())"
    )
    first, second = run(code, MDT_FAST_NATIVE=str(tmp_path)).splitlines()
    assert first.startswith("cannot be loaded: ")
    assert second == "[[1, 2]]"


def test_an_empty_folder_is_told_of(tmp_path: Path) -> None:
    """One process for all: the module only looks around when it is imported."""
    names = [str(tmp_path), str(tmp_path / "nowhere"), "1"]
    code = (
        "import importlib, os; from mdt_fast.kernels import native; print(native.MISSING['cpu'])\n"
        f"for name in {names[1:]}:\n"
        "    os.environ['MDT_FAST_NATIVE'] = name; print(importlib.reload(native).MISSING['cpu'])"
    )
    empty, *missing = run(code, MDT_FAST_NATIVE=names[0]).splitlines()
    assert empty.startswith(f"not in the folder that MDT_FAST_NATIVE={tmp_path}")
    for name, said in zip(names[1:], missing, strict=True):
        assert said.startswith(f"not there: MDT_FAST_NATIVE={name} is not a folder")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs the sanitizers' libraries to be preloaded")
def test_under_sanitizers(tmp_path: Path) -> None:
    """The C++ ops under their own tests, compiled to check every address and undefined behaviour."""
    runtime = subprocess.check_output(["g++", "-print-file-name=libasan.so"], text=True).strip()
    if not Path(runtime).is_absolute():
        pytest.skip("needs g++ with its address sanitizer")
    compile_ops(tmp_path, "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g1", "-O1")
    # The sanitizer looks up C++'s exceptions when it is loaded.
    exceptions = subprocess.check_output(["g++", "-print-file-name=libstdc++.so.6"], text=True).strip()
    run_tests(
        tmp_path, "kernels/test_mask_plan.py", "test_optim.py", *OPS_ALONE, ASAN_OPTIONS="detect_leaks=0",
        LD_PRELOAD=f"{runtime} {exceptions}", UBSAN_OPTIONS="print_stacktrace=1",
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux" or platform.machine() != "x86_64", reason="needs x86")
@pytest.mark.parametrize("flag", ["-DMDT_NO_AVX512", "-DMDT_ALWAYS_PAIRS"])
def test_what_other_processors_run(flag: str, tmp_path: Path) -> None:
    """Processors without AVX-512, and non-Intel ones that can multiply bfloat16 in pairs."""
    if flag == "-DMDT_ALWAYS_PAIRS" and not of_intel():
        pytest.skip("as this processor does")
    compile_ops(tmp_path, flag, "-O2", "-ffp-contract=off")
    run_tests(tmp_path, *OPS_ALONE)


OPS_ALONE = ("csrc/test_native_rows.py", "csrc/test_native_attention.py")


def compile_ops(folder: Path, *flags: str) -> None:
    """Compile ``csrc/``'s CPU library into ``folder``."""
    home = Path(torch.__file__).parent
    command = ["g++", "-std=c++17", "-fPIC", "-shared", "-DTORCH_TARGET_VERSION=0x020b000000000000", *flags]
    command += [f"-I{home / 'include'}", f"-L{home / 'lib'}"]
    sources = sorted(map(str, (ROOT / "csrc").glob("*.cpp")))
    subprocess.run([*command, *sources, "-ltorch_cpu", "-lc10", "-o", folder / "_cpu.so"], check=True)


def run_tests(folder: Path, *names: str, **variables: str) -> None:
    """Run these tests with the library in ``folder``."""
    env = os.environ | {"MDT_FAST_NATIVE": str(folder), "OMP_NUM_THREADS": "2"} | variables
    tests = [ROOT / "tests" / name for name in names]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", "not slow and not gpu",
         "-k", "not compile and not widest", *tests],
        capture_output=True, text=True, env=env, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
