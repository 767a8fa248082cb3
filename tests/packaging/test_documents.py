"""The documents: what they tell users to type works, links lead somewhere, places to fill in exist."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from mdt_fast import MDTv2, cli, read_weights, write_weights

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("kernels/**/*.md")])
README = (ROOT / "README.md").read_text()
COMMANDS = re.findall(r"^mdt-fast ([^#\n]*)", README, re.MULTILINE)
SMALL = {"depth": 6, "hidden_size": 32, "num_heads": 2}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_relative_links_lead_somewhere(document: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)", document.read_text())
    missing = [link for link in links if "://" not in link and not (document.parent / link).exists()]
    assert not missing


def test_the_bench_table_has_one_place() -> None:
    assert re.findall(r"<!-- bench:(\w+) -->", (ROOT / "docs/cpu.md").read_text()) == ["begin", "end"]
    assert "docs/cpu.md" in README


def test_make_targets_in_the_documents_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for document in DOCUMENTS:
        named = set(re.findall(r"(?:^|`)make ([a-z]+)\b", document.read_text(), re.MULTILINE))
        assert named <= targets, f"{document.name} names make targets that do not exist"


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_of_the_readme_parse(command: str) -> None:
    assert cli.parse(shlex.split(command)).command == command.split()[0]


def test_python_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The examples as printed, except for small models and three steps of sampling."""
    monkeypatch.chdir(tmp_path)
    write_weights("official.pt", MDTv2(mask_ratio=0.3, decode_layer=4, **SMALL).state_dict())
    code, loop, optimiser = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    small = "".join(f"{key}={value}, " for key, value in SMALL.items())
    names: dict[str, Any] = {}
    changes = {"import MDTv2_XL_2": "import MDTv2", "MDTv2_XL_2(": f"MDTv2({small}", "250": "3"}
    exec(changed(code, changes), names)
    latents = names["latents"]
    assert isinstance(latents, torch.Tensor)
    assert latents.shape == (2, 4, 32, 32)
    assert latents.isfinite().all()

    names = {}
    changes = {"import MDTv2_S_2": "import MDTv2", "MDTv2_S_2(": f"MDTv2({small}"}
    exec(changed(loop, {**changes, "decode_layer=6": "decode_layer=4"}), names)
    assert all(losses.isfinite().all() for losses in names["losses"].values())
    assert names["optimizer"].grad_norm > 0

    exec(optimiser, names)
    average, trained = (next(names[name].parameters()) for name in ("ema", "model"))
    assert 0 < (trained - average).abs().max() < 1e-3


def test_python_of_the_sampling_step_runs() -> None:
    """The block of ``kernels/cfg_step/README.md``, with a small model and three steps."""
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "kernels/cfg_step/README.md").read_text(), re.DOTALL)
    small = "".join(f"{key}={value}, " for key, value in SMALL.items())
    changes = {"import MDTv2_S_2": "import MDTv2", "MDTv2_S_2(": f"MDTv2({small}", '"50"': '"3"'}
    names: dict[str, Any] = {}
    exec(changed(code, {**changes, "decode_layer=6": "decode_layer=4"}), names)
    assert names["x"].shape == (2, 4, 32, 32)
    assert names["x"].isfinite().all()


def test_python_of_own_models_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of ``docs/own_models.md``, block after block."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names: dict[str, Any] = {}
    for code in re.findall(r"```python\n(.*?)```", (ROOT / "docs/own_models.md").read_text(), re.DOTALL):
        exec(code, names)
    assert names["drawn"].shape == names["x"].shape == (2, 4, 8, 8)
    assert names["drawn"].isfinite().all()
    assert names["x"].isfinite().all()
    assert names["result"].steps == 3
    assert names["full"].shape == (4, 16, 64)
    assert names["kept"].shape == (4, names["K"], 64)


@pytest.mark.slow
def test_the_script_of_own_loop_runs_on_two_processes(tmp_path: Path) -> None:
    script, *_ = re.findall(r"```python\n(.*?)```", (ROOT / "docs/own_loop.md").read_text(), re.DOTALL)
    small = "".join(f"{key}={value}, " for key, value in SMALL.items())
    changes = {"import FusedAdan, MaskPlan, MDTv2_S_2": "import FusedAdan, MaskPlan, MDTv2"}
    changes |= {"MDTv2_S_2(": f"MDTv2({small}", "decode_layer=6": "decode_layer=4"}
    (tmp_path / "train.py").write_text(
        changed(script, changes) + "print(rank, kept, sum(p.sum().item() for p in model.parameters()))\n"
    )
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*torchrun, "train.py"], capture_output=True, text=True, cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    one, other = (line.split() for line in sorted(done.stdout.splitlines()))
    assert [one[0], other[0]] == ["0", "1"]
    assert one[1:] == other[1:]  # the same number kept, the same weights
    assert read_weights(tmp_path / "ema.safetensors")


def changed(code: str, changes: dict[str, str]) -> str:
    for printed, run in changes.items():
        assert printed in code
        code = code.replace(printed, run)
    return code
