"""How the source tree hangs together: imports point one way, files stay short, no machine's paths in text."""

import ast
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = {"mdt_fast": ROOT / "mdt_fast", "mdt_fast.kernels": ROOT / "kernels"}
MAX_LINES = 400

# A room may import from rooms of a lower rank, and from itself.
RANK = {
    "errors": 0,
    "files": 0,
    "kernels": 0,
    "config": 1,
    "cuda_graphs": 1,
    "processes": 1,
    "presets": 2,
    "masking": 2,
    "optim": 2,
    "diffusion": 2,
    "data": 2,
    "reference": 3,
    "models": 4,
    "sampling": 5,
    "evaluation": 6,
    "training": 6,
    "doctor": 6,
    "official": 6,
    "pipelines": 7,
    "commands": 8,
    "options": 8,
    "cli": 9,
    "__main__": 10,
}


def modules() -> Iterator[tuple[str, Path]]:
    """Every module of the package with its dotted name as installed."""
    for package, folder in PACKAGES.items():
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            yield ".".join([package, *(part for part in parts if part != "__init__")]), path


MODULES = dict(modules())


def imported(name: str, path: Path) -> Iterator[str]:
    """Dotted names of everything ``path`` imports, relative imports resolved, function bodies included."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")
                parents = parents[: len(parents) - node.level + 1]
                base = ".".join([*parents, base] if base else parents)
            for alias in node.names:
                whole = f"{base}.{alias.name}"
                yield whole if whole in MODULES else base


def room(name: str) -> str:
    """``mdt_fast.models.mdt`` -> ``models``; the package itself -> an empty string."""
    return name.removeprefix("mdt_fast").removeprefix(".").partition(".")[0]


@pytest.mark.parametrize("name", [name for name in MODULES if room(name)])
def test_imports_point_one_way(name: str) -> None:
    """For every room; the package's own __init__, which gathers names from all of them, is left out."""
    here = room(name)
    assert here in RANK, f"{name}: give the room {here!r} a rank in this test"
    for target in imported(name, MODULES[name]):
        if not target.startswith("mdt_fast"):
            assert target.partition(".")[0] not in {"tests", "bench", "kernels"}, f"{name} imports {target}"
            continue
        there = room(target)
        if there != here:
            assert there, f"{name} imports the package's own __init__: import {target} from its room instead"
            assert RANK[there] < RANK[here], f"{name} imports {target}: imports point from {there} to {here}"


@pytest.mark.parametrize("name", [name for name in MODULES if room(name) in ("reference", "kernels")])
def test_oracle_and_kernels_stand_alone(name: str) -> None:
    """The oracle imports nothing that it judges, and kernel rooms import no models."""
    allowed = {"kernels": {"kernels"}, "reference": {"reference", "config", "errors", "masking"}}[room(name)]
    ours = {room(target) for target in imported(name, MODULES[name]) if target.startswith("mdt_fast")}
    assert ours <= allowed


def sources() -> list[Path]:
    """The files that git tracks or would add; none without git, where there is nothing to check against."""
    try:
        listed = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return []
    paths = (ROOT / name for name in listed.stdout.split("\0") if name)
    return [path for path in paths if path.is_file()]


def test_files_stay_short() -> None:
    sizes = {
        path.relative_to(ROOT): len(path.read_text().splitlines())
        for path in sources()
        if path.suffix in {".py", ".cpp", ".cu", ".h"}
    }
    assert not {path: lines for path, lines in sizes.items() if lines > MAX_LINES}


def test_no_path_of_one_machine_in_the_text() -> None:
    folders = ("home", "root", "tmp", "work", "Users", "mnt")
    roots = [f"{before}/{folder}/" for folder in folders for before in ("'", '"', " ", "(", "=", "`", ":")]
    found = []
    for path in sources():
        if path.suffix in {".safetensors", ".png", ".npz", ".pt"} or path.name == "LICENSE":
            continue
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if any(start in line for start in roots):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}")
    assert not found


def test_recorded_numbers_travel_with_the_repository() -> None:
    """The numbers that tests compare with must not be in files that git ignores."""
    if not sources():
        pytest.skip("needs git and a checkout")
    assert any(path.suffix == ".safetensors" and path.parent.name == "golden" for path in sources())
