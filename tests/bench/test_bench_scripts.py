"""The bench's small scripts about the digits and exported steps: what they print, and users' mistakes."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import convergence
import digits
import exported
import host
import inpainting
import solvers
import training
from mdt_fast import train
from tiny import tiny


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "run"
    train(tiny(steps=1), folder)
    return folder


def test_solvers(run: Path, tmp_path: Path, monkeypatch: Any, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("diffusers")
    monkeypatch.setattr(solvers, "STEPS", (2, 3))
    monkeypatch.setattr(solvers, "BOUNDS", (0.1,))
    whole = solvers.skipping
    monkeypatch.setattr(solvers, "skipping", lambda *args: whole(*args, steps=2))
    assert solvers.main([str(run), "--samples", "10", "--picture", str(tmp_path / "all.png")]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"^steps .* ddpm .* unipc$", printed, re.MULTILINE)
    assert re.search(r"^ +3 ( +\d+\.\d% \(\d\.\d{3}\)){4}$", printed, re.MULTILINE)
    assert "skip_below 0.1: " in printed
    assert (tmp_path / "all.png").stat().st_size > 1000


def test_inpainting(run: Path, tmp_path: Path, monkeypatch: Any, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(inpainting, "SAMPLERS", ("ddpm", "ddim"))
    config = inpainting.SampleConfig
    monkeypatch.setattr(inpainting, "SampleConfig", lambda **kwargs: config(steps=2, **kwargs))
    picture = str(tmp_path / "fills.png")
    options = ["--digits", "5", "--fills", "2", "--picture", picture]  # of ten classes
    assert inpainting.main([str(run), *options]) == 0
    assert "right half" in capsys.readouterr().out
    assert (tmp_path / "fills.png").stat().st_size > 1000


def test_host(monkeypatch: Any, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(host, "DEVICE", "cpu")
    assert host.main(["--model", "digits", "--batch", "1", "--rounds", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [tuple(line.split()[:2]) for line in lines] == [(m, p) for m in host.MODES for p in host.PROVIDERS]
    assert all(re.search(r" ms \(.*, least .*\), \d.\d\dx the reference \(", line) for line in lines)


@pytest.mark.parametrize(
    ("script", "argv", "message"),
    [
        (solvers, ["nowhere"], "solvers: error: "),
        (solvers, ["nowhere", "--samples", "0"], "solvers: error: --samples: got 0, expected 1 or more"),
        (solvers, ["nowhere", "--sample", "9"], "solvers: error: unrecognized arguments: --sample 9"),
        (inpainting, ["nowhere"], "inpainting: error: "),
        (inpainting, ["nowhere", "--fills", "0"], "inpainting: error: --fills: got 0, expected 1 or more"),
        (host, ["--rounds", "1"], "host: error: --rounds: got 1, expected 2 or more"),
        (host, ["--model", "narow"], "host: error: --model: unknown model 'narow' (did you mean 'narrow'?)"),
        (exported, ["--model", "MDT_S4"], "error: --model: got 'MDT_S4' (did you mean 'MDT_S_4'?), expected"),
        (exported, ["--rounds", "1"], "exported: error: --rounds: got 1, expected 2 or more"),
        (
            digits,
            ["--out", "new", "--ways", "voxels"],
            "--ways: got 'voxels' (did you mean 'pixels'?), expected",
        ),
        (digits, ["--out", "new", "--vae-steps", "0"], "digits: error: --vae-steps: got 0, expected 1 or"),
        (digits, ["--out", "."], "digits: error: --out: cannot make '.': File exists"),
        (digits, ["--out", "new", "--threads", "5000"], "digits: error: --threads: got 5000, expected 1 to"),
        (exported, ["--threads", "0"], "exported: error: --threads: got 0, expected 1 to 1024"),
        (solvers, ["nowhere", "--threads", "5000"], "error: --threads: got 5000, expected 1 to 1024"),
        (inpainting, ["nowhere", "--threads", "5000"], "error: --threads: got 5000, expected 1 to 1024"),
        (training, ["--threads", "5000"], "error: --threads: got 5000, expected 1 to 1024"),
        (convergence, ["--threads", "5000", "--out", "/tmp"], "--threads: got 5000, expected 1 to 1024"),
        (solvers, ["nowhere", "--picture", "a.jpg"], "--picture: got 'a.jpg', expected a file that ends in"),
        (solvers, ["nowhere", "--picture", "no/a.png"], "--picture: cannot write 'no/a.png': No such file"),
        (inpainting, ["nowhere", "--picture", "no/a.png"], "--picture: cannot write 'no/a.png': No such"),
    ],
)
def test_mistakes(script: Any, argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    assert script.main(argv) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    torch.set_num_threads(threads)


def test_the_index_names_every_file() -> None:
    """A table with the commands, and lists with the modules."""
    folder = Path(digits.__file__).parent
    commands, modules = (folder / "README.md").read_text().split("## Modules")
    for path in folder.glob("*.py"):
        if "__main__" in path.read_text():
            assert f"| `{path.name}` |" in commands
        else:
            assert f"`{path.stem}`" in modules
