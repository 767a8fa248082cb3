"""``mdt-fast evaluate`` of digits and of folders of samples, with the network that the documents show."""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from feature_networks import forget
from mdt_fast.cli import main
from mdt_fast.sampling import SampleFolder, save_npz

DOCUMENT = Path(__file__).parents[1] / "docs" / "evaluation.md"
FEATURES = "--features=pixelfeat:features"


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*sys.path])
    (code,) = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    Path("pixelfeat.py").write_text(code)
    yield
    forget("pixelfeat")


def noise(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 8, 8, 1), dtype=np.uint8)


def evaluate(*arguments: str) -> int:
    return main(["evaluate", *arguments, "--device=cpu", "--threads=1"])


def test_the_digits_are_a_reference(tmp_path: Path) -> None:
    save_npz(tmp_path / "noise.npz", noise(100), [0] * 100)
    fid = {}
    for samples in ("noise.npz", "digits"):
        assert evaluate(samples, "--reference=digits", FEATURES, "--metrics=fid", "--json=o.json") == 0
        found = json.loads(Path("o.json").read_text())
        fid[samples] = found["metrics"]["fid"]
        assert found["reference"] == {"path": "digits", "count": 1797, "shape": [8, 8, 1]}
    assert fid["digits"] == pytest.approx(0, abs=1e-9)
    assert fid["noise.npz"] > 1


def test_a_reference_says_which_network_it_needs(capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate("digits", FEATURES, "--save-features=real.safetensors") == 0
    assert evaluate("digits", "--reference=real.safetensors") == 2
    wanted = "'real.safetensors' was made with pixelfeat:features; pass --features pixelfeat:features\n"
    assert capsys.readouterr().err.endswith(wanted)
    assert evaluate("real.safetensors", "--reference=real.safetensors", "--metrics=fid") == 0, (
        "none is needed"
    )


def test_a_folder_of_samples(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = SampleFolder(tmp_path / "samples", {}, [0] * 6, 4)
    folder.prepare()
    folder.write(0, noise(4))
    options = ["samples", "--reference=digits", FEATURES, "--metrics=fid", "--json=o.json"]
    assert evaluate(*options) == 2
    assert "'samples' holds samples that are not complete yet; resume with" in capsys.readouterr().err
    folder.write(1, noise(2))
    folder.assemble()
    assert evaluate(*options) == 0
    assert json.loads(Path("o.json").read_text())["samples"] == {
        "path": "samples/samples_6x8x8x1.npz", "count": 6, "shape": [8, 8, 1],
    }  # fmt: skip


def test_the_word_is_the_data_set_even_beside_a_folder_of_that_name(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """``--data digits`` ignores such a folder, too."""
    folder = Path("digits")
    folder.mkdir()
    Image.fromarray(noise(1)[0, ..., 0]).save(folder / "0.png")
    options = ["--reference=digits", FEATURES, "--metrics=fid", "--json=o.json"]
    assert evaluate("digits", *options) == 0
    assert json.loads(Path("o.json").read_text())["reference"]["count"] == 1797
    Image.fromarray(noise(2)[1, ..., 0]).save(folder / "1.png")
    assert evaluate("./digits", *options) == 0
    assert json.loads(Path("o.json").read_text())["samples"]["count"] == 2
    assert evaluate("digits", *options, "--image-size=8") == 2
    assert "--image-size: crops images in folders" in capsys.readouterr().err
