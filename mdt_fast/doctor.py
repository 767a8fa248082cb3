"""Reports what this machine has, which backend runs each op and why, what is missing and how to get it.

:func:`report` collects, :func:`main` prints. Nothing here raises: a failed query appears as a one-line
error in place of its answer.
"""

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from json import dumps
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class OptionalPackage:
    """An optional package: what this version of ``mdt_fast`` uses it for, and how to get it."""

    name: str
    module: str
    use: str
    get: str


OPTIONAL = (
    OptionalPackage(
        "scikit-learn",
        "sklearn",
        "the digits data set in `train --preset digits` and the bench",
        "pip install scikit-learn",
    ),
    OptionalPackage(
        "matplotlib",
        "matplotlib",
        "the loss curve of a run, and the bench's --plot",
        "pip install matplotlib",
    ),
    OptionalPackage(
        "timm", "timm", "the bench's provider `official` (otherwise a stand-in)", "pip install timm"
    ),
    OptionalPackage(
        "diffusers",
        "diffusers",
        "the autoencoder between images and latents, fast solvers, MDTPipeline",
        "pip install diffusers",
    ),
    OptionalPackage(
        "tensorboard", "tensorboard", "curves and pictures while `train` runs", "pip install tensorboard"
    ),
    OptionalPackage("wandb", "wandb", "the same on wandb (`train.wandb`)", "pip install wandb"),
    OptionalPackage(
        "torchmetrics",
        "torchmetrics",
        "the tests, which compare `evaluate` with it",
        "pip install torchmetrics",
    ),
    OptionalPackage(
        "torch-fidelity",
        "torch_fidelity",
        "`evaluate --features inception-v3-compat`",
        "pip install torch-fidelity torchvision",
    ),
    OptionalPackage(
        "torchao", "torchao", "its float8 matmuls (`train.float8_by=torchao`)", "pip install torchao"
    ),
    OptionalPackage(
        "flash-attn",
        "flash_attn",
        "attention_backend='flash_attn' (models without a bias table)",
        "pip install --no-build-isolation flash-attn",
    ),
    OptionalPackage(
        "flash-attn-4",
        "flash_attn.cute",
        "attention_backend='flash_attn' (the forward pass with a bias table)",
        "pip install --pre flash-attn-4",
    ),
    OptionalPackage("xformers", "xformers", "attention_backend='xformers'", "pip install xformers"),
    OptionalPackage(
        "apex",
        "apex",
        "its FusedAdam beside ours in `bench/kernels.py`",
        "from source: github.com/NVIDIA/apex",
    ),
)


def report() -> dict[str, Any]:
    """Everything that :func:`main` prints, as plain JSON-ready values (see the code for the keys)."""
    return {
        "versions": {
            "python": platform.python_version(),
            "mdt_fast": distribution_version("mdt-fast"),
            "torch": torch.__version__,
            "triton": distribution_version("triton"),
            "numpy": distribution_version("numpy"),
        },
        "cpu": {
            "name": cpu_name(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "capability": _safely(torch.backends.cpu.get_cpu_capability),
        },
        "gpus": _safely(_gpus),
        "cuda": {
            "torch_built_for": torch.version.cuda,
            "driver": nvidia_driver(),
            "nvcc": _tool_version(shutil.which("nvcc"), line=-2),
        },
        "compiler": {"c++": _tool_version(cpp_compiler()), "ninja": _tool_version(shutil.which("ninja"))},
        "ops": _safely(_ops),
        "attention": _safely(_attention),
        "optional": optional_packages(),
    }


def main(json: bool = False) -> int:
    """Print :func:`report` as tables, or as JSON. Returns the exit code, 0."""
    found = report()
    if json:
        print(dumps(found, indent=2))
    else:
        _print_tables(found)
    return 0


def cpu_name() -> str:
    """The processor's name, or its architecture if the system does not report one."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def nvidia_driver() -> str | None:
    """Version of the NVIDIA driver, or None if there is none."""
    if nvidia_smi := shutil.which("nvidia-smi"):
        first = _first_output([nvidia_smi, "--query-gpu=driver_version", "--format=csv,noheader"])
        if first and first[0].isdigit():
            return first
    return None


def cpp_compiler() -> str | None:
    """Path of the C++ compiler that ``torch.compile`` would use on a CPU, or None."""
    for name in (os.environ.get("CXX"), "g++", "clang++", "c++"):
        if name and (path := shutil.which(name)):
            return path
    return None


def distribution_version(name: str) -> str | None:
    """Version of an installed distribution, or None."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def optional_packages(packages: tuple[OptionalPackage, ...] = OPTIONAL) -> list[dict[str, str | None]]:
    """One row per package: ``name, version, error, use, get``.

    ``version`` is None if the package is not installed; ``error`` is one line if it is installed but cannot
    be imported. Imports run in separate processes, so that one that aborts does no harm.
    """
    imports = {p.name: _start_import(p.module) for p in packages if _installed(p)}
    rows: list[dict[str, str | None]] = []
    for package in packages:
        version, error = _finish_import(imports.get(package.name))
        rows.append(
            {
                "name": package.name,
                "version": distribution_version(package.name) or version,
                "error": error,
                "use": package.use,
                "get": package.get,
            }
        )
    return rows


IMPORT_SECONDS = 60
"""How long an optional package may take to import before it counts as broken."""


def _installed(package: OptionalPackage) -> bool:
    if distribution_version(package.name):
        return True
    # A package without metadata (a source tree on the path) is found by name, without running it.
    return any((Path(folder or ".") / package.module / "__init__.py").exists() for folder in sys.path)


def _start_import(module: str) -> subprocess.Popen[str] | str:
    code = f"import {module} as m; print(getattr(m, '__version__', 'unknown'))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(folder for folder in sys.path if folder)}
    try:
        return subprocess.Popen(
            [sys.executable, "-P", "-c", code],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            env=environment,
        )
    except OSError as error:
        return f"could not try to import: {error}"


def _finish_import(process: subprocess.Popen[str] | str | None) -> tuple[str | None, str | None]:
    """(version, error) of an import started by :func:`_start_import`."""
    if process is None:
        return None, None
    if isinstance(process, str):
        return None, process
    try:
        output, errors = process.communicate(timeout=IMPORT_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return None, f"import took more than {IMPORT_SECONDS} s"
    if process.returncode == 0:
        return _last_line(output), None
    return None, _raised(errors) or f"import ended with code {process.returncode}"


def _gpus() -> list[dict[str, Any]]:
    gpus = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        gpus.append(
            {
                "name": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "memory_bytes": properties.total_memory,
            }
        )
    return gpus


def _ops() -> list[dict[str, str]]:
    from mdt_fast.kernels import backends

    return [{"op": row.op, "backend": row.backend, "reason": row.reason} for row in backends()]


def _attention() -> list[dict[str, str]]:
    from mdt_fast.kernels import attention_backends

    return [{"name": row.op, "found": row.backend, "serves": row.reason} for row in attention_backends()]


def _safely(question: Callable[[], Any]) -> Any:
    """The answer, or ``{"error": one line}``: one failed query must not hide the others."""
    try:
        return question()
    except Exception as error:
        return {"error": " ".join(f"{type(error).__name__}: {error}".split())}


def _tool_version(path: str | None, line: int = 0) -> str | None:
    """``path: `` and the given line of its ``--version`` output, or None without a path."""
    if path is None:
        return None
    return f"{path}: {_first_output([path, '--version'], line) or 'does not run'}"


def _first_output(command: list[str], line: int = 0) -> str | None:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=20, check=False
        )
    except (OSError, subprocess.SubprocessError):
        return None
    lines = [text.strip() for text in done.stdout.splitlines() if text.strip()]
    if done.returncode != 0 or not lines:
        return None
    return lines[line] if -len(lines) <= line < len(lines) else lines[0]


def _raised(traceback: str) -> str:
    """The last exception in a traceback, in one line; empty if there is none."""
    found = list(re.finditer(r"^[\w.]+(Error|Exception|Exit|Interrupt|Warning)\b", traceback, re.MULTILINE))
    return " ".join(traceback[found[-1].start() :].split()) if found else ""


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""


def _print_tables(found: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()

    def table(title: str, columns: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
        made = Table(
            *columns, title=title, title_justify="left", title_style="bold", box=None, pad_edge=False
        )
        for row in rows:
            made.add_row(*(escape(cell) for cell in row))
        console.print(made, "")

    table("This machine", ("what", "found"), _machine_rows(found))
    table("Which backend runs each op", ("op", "backend", "why"), _op_rows(found["ops"]))
    table(
        "Attention backends", ("attention_backend=", "found", "serves"), _attention_rows(found["attention"])
    )
    table(
        "Optional packages",
        ("package", "found", "used for", "how to get it"),
        [
            (p["name"], _package_state(p), p["use"], "" if p["version"] else p["get"])
            for p in found["optional"]
        ],
    )


def _machine_rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    cpu, cuda, compiler, gpus = found["cpu"], found["cuda"], found["compiler"], found["gpus"]
    rows = [(name, version or "missing") for name, version in found["versions"].items()]
    rows.append(
        ("CPU", f"{cpu['name']}, {cpu['cores']} cores, {cpu['threads']} threads, {_text(cpu['capability'])}")
    )
    if isinstance(gpus, dict):
        rows.append(("GPU", _text(gpus)))
    for gpu in gpus if isinstance(gpus, list) else []:
        memory = gpu["memory_bytes"] / 2**30
        rows.append(("GPU", f"{gpu['name']}, compute capability {gpu['capability']}, {memory:.0f} GiB"))
    if gpus == []:
        rows.append(("GPU", "none: everything runs on the CPU"))
    built = (
        f"torch is built for CUDA {cuda['torch_built_for']}"
        if cuda["torch_built_for"]
        else "torch has no CUDA"
    )
    rows.append(("CUDA", f"{built}; driver {cuda['driver'] or 'missing'}; nvcc {cuda['nvcc'] or 'missing'}"))
    rows.append(
        ("C++ compiler", compiler["c++"] or "missing: torch.compile on the CPU needs one (g++ or clang++)")
    )
    rows.append(("ninja", compiler["ninja"] or "missing: pip install ninja"))
    return rows


def _op_rows(ops: list[dict[str, str]] | dict[str, str]) -> list[tuple[str, ...]]:
    if isinstance(ops, dict):
        return [("-", "-", _text(ops))]
    return [(row["op"], row["backend"], row["reason"]) for row in ops]


def _attention_rows(backends: list[dict[str, str]] | dict[str, str]) -> list[tuple[str, ...]]:
    if isinstance(backends, dict):
        return [("-", "-", _text(backends))]
    return [(row["name"], row["found"], row["serves"]) for row in backends]


def _package_state(package: dict[str, str | None]) -> str:
    if package["error"]:
        return f"{package['version'] or ''} broken: {package['error']}".strip()
    return package["version"] or "missing"


def _text(value: Any) -> str:
    return f"error: {value['error']}" if isinstance(value, dict) else str(value)
