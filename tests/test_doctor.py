"""``mdt-fast doctor``: complete, readable, and not brought down by what it finds."""

import json
from pathlib import Path

import pytest
import torch

from mdt_fast import doctor
from mdt_fast.doctor import OptionalPackage


@pytest.fixture(scope="module")
def found() -> dict:
    return doctor.report()


@pytest.mark.slow
def test_it_names_versions_devices_ops_and_packages(found: dict) -> None:
    assert found["versions"]["torch"] == torch.__version__
    assert found["cpu"]["cores"] >= 1
    assert len(found["gpus"]) == torch.cuda.device_count()
    assert {"rel_attention", "ln_modulate"} <= {row["op"] for row in found["ops"]}
    assert all(row["backend"] and row["reason"] for row in found["ops"])
    backends = [row["name"] for row in found["attention"]]
    assert backends == ["triton", "samples", "sdpa", "flex", "xformers", "flash_attn"]
    assert all(row["found"] and row["serves"] for row in found["attention"])
    names = {row["name"] for row in found["optional"]}
    known = {
        "tensorboard",
        "wandb",
        "flash-attn",
        "flash-attn-4",
        "xformers",
        "apex",
        "torchao",
        "diffusers",
        "timm",
        "torchmetrics",
    }
    assert known <= names
    assert all(row["use"] and row["get"] for row in found["optional"])


def test_text_and_json_say_the_same(
    found: dict, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "report", lambda: found)
    assert doctor.main(json=True) == 0
    assert json.loads(capsys.readouterr().out) == found
    assert doctor.main() == 0
    text = capsys.readouterr().out
    for word in (torch.__version__, "rel_attention", "flash-attn", "its FusedAdam beside ours"):
        assert word in text


def write(folder: Path, name: str, code: str) -> OptionalPackage:
    (folder / name).mkdir()
    (folder / name / "__init__.py").write_text(code)
    return OptionalPackage(name, name, "a test", "nowhere")


def test_broken_packages_are_one_line_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    packages = (
        write(tmp_path, "whole_package", "__version__ = '1.2'\nprint('hello')"),
        write(tmp_path, "raising_package", "raise RuntimeError('built for\\nanother torch')"),
        write(tmp_path, "aborting_package", "import os\nos.abort()"),
        OptionalPackage("missing_package", "missing_package", "a test", "nowhere"),
    )
    whole, raising, aborting, missing = doctor.optional_packages(packages)
    assert (whole["version"], whole["error"]) == ("1.2", None)
    assert raising["error"] == "RuntimeError: built for another torch"
    assert aborting["error"].startswith("import ended with code")
    assert (missing["version"], missing["error"]) == (None, None)


def test_a_package_that_never_finishes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(doctor, "IMPORT_SECONDS", 0.2)
    (row,) = doctor.optional_packages((write(tmp_path, "endless_package", "import time\ntime.sleep(60)"),))
    assert row["error"] == "import took more than 0.2 s"


def test_broken_parts_do_not_hide_the_others(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*args: object) -> None:
        raise RuntimeError("driver is too old\nfor this torch")

    monkeypatch.setattr(torch.cuda, "device_count", broken)
    monkeypatch.setattr("mdt_fast.kernels.backends", broken)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", broken)
    monkeypatch.setattr(doctor, "optional_packages", list)
    assert doctor.main() == 0
    assert "RuntimeError: driver is too old for this torch" in " ".join(capsys.readouterr().out.split())


def test_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    assert doctor.cpp_compiler() is None
    assert doctor.nvidia_driver() is None
