"""What is installed: the wheel's contents, its metadata, and an import that needs nothing optional."""

import importlib.metadata
import shutil
import subprocess
import sys
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = ["mdt_fast", "kernels", "setup.py", "pyproject.toml", "README.md", "LICENSE"]
EXTRAS = {"watch", "train", "latents", "sample", "eval", "fid", "cuda", "fp8", "nvcc", "test", "dev"}
OPTIONAL = [
    "triton",
    "sklearn",
    "matplotlib",
    "scipy",
    "diffusers",
    "torchvision",
    "torchmetrics",
    "torch_fidelity",
    "torchao",
    "xformers",
]

# Runs in a fresh interpreter: every optional package is made to look missing, then every module is imported,
# except the rooms' Triton kernels (their op.py imports them where Triton serves it) and csrc's libraries,
# which are no modules.
IMPORT_WITHOUT_OPTIONALS = f"""
import importlib.util, pkgutil, sys, time

def missing(name):
    return name.partition(".")[0] in {OPTIONAL!r}

class Missing:
    def find_spec(self, name, path=None, target=None):
        if missing(name):
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if missing(name) else find_spec(name, package)

sys.meta_path.insert(0, Missing())
import torch
start = time.perf_counter()
import mdt_fast, mdt_fast.kernels
print(time.perf_counter() - start)
def room_aot(name):
    return name.startswith("mdt_fast.kernels.") and name.endswith(".aot") and name.count(".") == 3

assert all(hasattr(mdt_fast, name) for name in dir(mdt_fast))
for package in (mdt_fast, mdt_fast.kernels):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        triton = (".kernel", ".kernel_bwd", ".kernel_table", ".launch", ".launcher", ".triton_op", ".move_op")
        native = ("._cpu", "._cuda")
        derived = (".pipelines.pipeline",)  # its class is one of diffusers
        if not (module.name.endswith((*triton, *native, *derived, ".__main__")) or room_aot(module.name)):
            importlib.import_module(module.name)
"""

IMPORT_BESIDE_OPTIONALS = f"""
import sys, torch
before = set(sys.modules)
import mdt_fast, mdt_fast.kernels
print(*sorted(set({OPTIONAL!r}) & (set(sys.modules) - before)))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """A wheel built from a copy, without the network: the source tree stays as it is."""
    try:  # looking for the module instead would bring Python's own distutils into this process
        importlib.metadata.version("pip")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("needs pip to build a wheel")
    source = tmp_path_factory.mktemp("source")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, source / name)
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index"]
    built = subprocess.run([*command, "-w", str(out), str(source)], capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    (path,) = out.glob("*.whl")
    return zipfile.ZipFile(path)


def metadata(wheel: zipfile.ZipFile) -> Message:
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    return Parser().parsestr(wheel.read(name).decode())


def test_wheel_holds_every_module_and_the_rooms(wheel: zipfile.ZipFile) -> None:
    expected = {path.relative_to(ROOT).as_posix() for path in (ROOT / "mdt_fast").rglob("*.py")}
    for pattern in ("*.py", "README.md", "tuned.json"):
        for path in (ROOT / "kernels").rglob(pattern):
            expected.add("mdt_fast/" + path.relative_to(ROOT).as_posix())
    expected -= {"mdt_fast/kernels/README.md"} - set(wheel.namelist())
    assert expected <= set(wheel.namelist())
    assert "mdt_fast/py.typed" in wheel.namelist()
    assert "mdt_fast/kernels/__init__.py" in wheel.namelist()


def test_wheel_holds_nothing_else(wheel: zipfile.ZipFile) -> None:
    tops = {name.partition("/")[0] for name in wheel.namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"mdt_fast"}


def test_wheel_metadata(wheel: zipfile.ZipFile) -> None:
    fields = metadata(wheel)
    assert fields["Name"] == "mdt-fast"
    assert fields["License-Expression"] == "Apache-2.0"
    assert fields["Requires-Python"] == ">=3.11"
    assert set(fields.get_all("Provides-Extra", [])) == EXTRAS
    assert any(name.endswith("licenses/LICENSE") for name in wheel.namelist())


def test_base_install_is_small(wheel: zipfile.ZipFile) -> None:
    required = metadata(wheel).get_all("Requires-Dist", [])
    assert not [line for line in required if "torchvision" in line]
    assert not [
        line for line in required if "extra ==" not in line and line.startswith(("flash", "xformers"))
    ]


def test_command_is_installed() -> None:
    (command,) = importlib.metadata.entry_points(group="console_scripts", name="mdt-fast")
    assert command.value == "mdt_fast.cli:main"


def test_constraints_pin_what_is_installed() -> None:
    """Each line is one exact version, and every dependency of the base and test extras is pinned."""
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pinned = dict(line.split("==") for line in lines)
    assert {normal(name) for name in pinned} >= {normal(name) for name in dependencies("mdt-fast", {"test"})}


def normal(name: str) -> str:
    return name.lower().replace("_", "-").replace(".", "-")


def dependencies(name: str, extras: set[str]) -> set[str]:
    """Direct and indirect dependencies as installed here, without torch's CUDA packages: torch pins them."""
    from packaging.requirements import Requirement

    found: set[str] = set()
    todo = [(name, frozenset(extras))]
    seen = set()
    while todo:
        name, asked = todo.pop()
        if (name, asked) in seen:
            continue
        seen.add((name, asked))
        for line in importlib.metadata.requires(name) or []:
            requirement = Requirement(line)
            marker = requirement.marker
            wanted = marker is None or any(marker.evaluate({"extra": extra}) for extra in asked | {""})
            if wanted and not normal(requirement.name).startswith(("nvidia-", "cuda-")):
                found.add(requirement.name)
                todo.append((requirement.name, frozenset(requirement.extras)))
    return found - {"mdt-fast"}


def test_import_needs_nothing_optional(tmp_path: Path) -> None:
    """From another folder, with every optional package missing; it takes less than 10 s on top of torch."""
    command = [sys.executable, "-c", IMPORT_WITHOUT_OPTIONALS]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 10.0, f"importing mdt_fast took {done.stdout.strip()} s on top of torch"


def test_import_touches_no_optional_package(tmp_path: Path) -> None:
    """A plain import leaves the slow optional packages alone, even if they are installed."""
    command = [sys.executable, "-c", IMPORT_BESIDE_OPTIONALS]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []
