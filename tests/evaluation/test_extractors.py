"""Networks by name, path and module: what they return, what is refused; nothing is fetched or unpickled."""

import os
import pickle
import re
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from feature_networks import CLASSES, DIM, MODULE, NvidiaStyle, Small, WithLogits, forget
from mdt_fast.errors import UserError
from mdt_fast.evaluation import is_published, open_extractor
from mdt_fast.evaluation.extractors import _whole_float32

IMAGES = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))

FIDELITY = """
import torch
from torch import nn

class FeatureExtractorInceptionV3(nn.Module):
    def __init__(self, name, features_list, feature_extractor_weights_path=None):
        super().__init__()
        assert (name, features_list) == ("inception-v3-compat", ["2048", "logits_unbiased"])
        self.Mixed_6d = nn.Module()
        self.Mixed_6d.branch1x1 = nn.Sequential(nn.Conv2d(3, 192, 1), nn.ReLU())
        self.fc = nn.Linear(192, 1008)
        self.load_state_dict(torch.load(feature_extractor_weights_path, weights_only=False))

    def forward(self, x):
        assert x.dtype == torch.uint8 and x.shape[1] == 3
        pooled = self.Mixed_6d.branch1x1(x.float() / 255).mean((2, 3))
        return pooled, pooled.mm(self.fc.weight.T)
"""


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A working folder with a hub folder in it, no network, and no modules of another test."""

    def refuse(*arguments: object, **named: object) -> None:
        raise AssertionError("something was to be downloaded")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("sys.path", [*__import__("sys").path])
    (tmp_path / "mine.py").write_text(MODULE)
    yield
    forget("mine", "torch_fidelity")


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package with torch-fidelity's interface and a much smaller network; returns the network's weights."""
    package = tmp_path / "packages" / "torch_fidelity"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "feature_extractor_inceptionv3.py").write_text(FIDELITY)
    monkeypatch.syspath_prepend(tmp_path / "packages")
    forget("torch_fidelity")
    generator = torch.Generator().manual_seed(0)
    state = {
        "Mixed_6d.branch1x1.0.weight": torch.randn(192, 3, 1, 1, generator=generator),
        "Mixed_6d.branch1x1.0.bias": torch.randn(192, generator=generator),
        "fc.weight": torch.randn(1008, 192, generator=generator),
        "fc.bias": torch.full((1008,), 1e9),  # the classes' bias must not be used
    }
    torch.save(state, tmp_path / "weights.pth")
    return tmp_path / "weights.pth"


@pytest.mark.parametrize("place", ["given", "hub"])
def test_torch_fidelitys_inception(place: str, weights: Path) -> None:
    given: str | None = str(weights)
    if place == "hub":
        hub = Path(os.environ["TORCH_HOME"]) / "hub" / "checkpoints"
        hub.mkdir(parents=True)
        weights.rename(hub / "weights-inception-2015-12-05-6726825d.pth")
        given = None
    extractor = open_extractor("inception-v3-compat", weights=given)
    assert re.fullmatch(
        r"inception-v3-compat sha256:[0-9a-f]{16} \(not the published weights\)", extractor.name
    )
    assert not is_published(extractor.name)
    found = extractor(IMAGES)
    assert found.pooled.shape == (4, 192)
    assert found.spatial.shape == (4, 192, 8, 8)
    assert found.spatial.min() == 0, "after the ReLU"
    torch.testing.assert_close(found.spatial.mean((2, 3)), found.pooled)
    assert found.probabilities.shape == (4, 1008)
    assert found.probabilities.std(1).min() > 0, "without the bias"
    grey = extractor(IMAGES[:, :1])
    torch.testing.assert_close(grey.pooled, extractor(IMAGES[:, :1].repeat(1, 3, 1, 1)).pooled)


def test_weights_are_asked_for_and_never_downloaded(weights: Path) -> None:
    with pytest.raises(UserError, match=r"needs its weights; get https://github\S+5d\.pth and give it by"):
        open_extractor("inception-v3-compat")
    with pytest.raises(UserError, match=r"no file 'none\.pth'; get https://"):
        open_extractor("inception-v3-compat", weights="none.pth")


def test_weights_are_not_unpickled(weights: Path, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple:
            return Path.touch, (tmp_path / "executed",)

    for write in (lambda file: torch.save(Evil(), file), lambda file: file.write_bytes(pickle.dumps(Evil()))):
        write(weights)
        with pytest.raises(UserError, match=r"weights\.pth' does not hold the weights"):
            open_extractor("inception-v3-compat", weights=str(weights))
    assert not (tmp_path / "executed").exists()


@pytest.fixture
def without_torch_fidelity(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)


@pytest.mark.usefixtures("without_torch_fidelity")
def test_without_torch_fidelity_it_says_how_to_get_it(tmp_path: Path) -> None:
    (tmp_path / "weights.pth").touch()
    with pytest.raises(UserError, match=r"cannot be imported \(.*torch_fidelity.*mdt-fast\[fid\]"):
        open_extractor("inception-v3-compat", weights="weights.pth")


@pytest.mark.usefixtures("without_torch_fidelity")
def test_all_that_inception_lacks_is_named_at_once() -> None:
    with pytest.raises(
        UserError, match=r"pip install 'mdt-fast\[fid\]'; and it needs its weights; get https://"
    ):
        open_extractor("inception-v3-compat")


def test_programs_run_only_if_trusted() -> None:
    torch.jit.script(Small()).save("small.pt")
    dynamic = {"images": {0: torch.export.Dim("batch")}}
    torch.export.save(torch.export.export(WithLogits(), (IMAGES,), dynamic_shapes=dynamic), "logits.pt2")
    torch.jit.script(NvidiaStyle()).save("nvidia.pt")
    expected = WithLogits()(IMAGES)
    for name in ("small.pt", "logits.pt2", "nvidia.pt"):
        with pytest.raises(UserError, match=f"'{name}' is a program.*add --trust-features"):
            open_extractor(name)
        extractor = open_extractor(name, trust=True)
        assert re.fullmatch("program sha256:[0-9a-f]{16}", extractor.name)
        found = extractor(IMAGES)
        torch.testing.assert_close(found.pooled, expected["pooled"])
        if name == "nvidia.pt":
            assert found.spatial is None
        else:
            torch.testing.assert_close(found.spatial, expected["spatial"])
        if name == "small.pt":
            assert found.probabilities is None
        else:
            torch.testing.assert_close(found.probabilities, expected["logits"].softmax(1))


def test_functions_modules_and_classes() -> None:
    assert open_extractor("mine:mean")(IMAGES).pooled.shape == (4, 3)
    module, made = open_extractor("mine:module"), open_extractor("mine:Class")
    assert module(IMAGES).probabilities.shape == (4, CLASSES)
    assert made(IMAGES).pooled.shape == (4, DIM)
    assert len({open_extractor(f"mine:{name}").name for name in ("mean", "module", "Class")}) == 3
    assert open_extractor("mine:module").name == module.name


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("inception-v3-compact", r"compact' \(did you mean 'inception-v3-compat'\?\), expected"),
        ("none.pt", "no file 'none.pt'"),
        ("weights.pt", "neither a TorchScript nor a torch.export program"),
        ("weights.pt2", "neither a TorchScript nor a torch.export program"),
        ("no_such_module:x", "cannot import 'no_such_module'"),
        ("mine:maen", r"'mine' has no 'maen' \(did you mean 'mean'\?\)"),
        ("mine:number", "is int; a function or a torch.nn.Module is needed"),
        ("mine:nothing", r"returned NoneType; pooled \[B, D\]"),
        ("mine:no_pooled", "returned pooled NoneType; 2 dimensions"),
        ("mine:no_features", r"returned pooled \[4, 0\]; 2 dimensions, the first of them 4, are needed, and"),
        ("mine:transposed", r"returned pooled \[3, 4\]; 2 dimensions, the first of them 4"),
        ("mine:breaks", r"failed on uint8 \[4, 3, 8, 8\]: three lines of it"),
    ],
)
def test_mistakes_are_one_line(given: str, message: str) -> None:
    Path("weights.pt").write_bytes(np.arange(99).tobytes())
    Path("weights.pt2").write_bytes(b"PK nothing")
    with pytest.raises(UserError, match=message) as raised:
        open_extractor(given, trust=True)(IMAGES)
    assert "\n" not in str(raised.value)


def test_products_are_in_whole_float32_and_settings_come_back() -> None:
    """Also after an error; on a CPU nothing is touched."""
    backends = torch.backends.cudnn.conv, torch.backends.cuda.matmul
    before = [backend.fp32_precision for backend in backends]

    def failing() -> None:
        with _whole_float32(True):
            assert [backend.fp32_precision for backend in backends] == ["ieee", "ieee"]
            raise ValueError("inside")

    with pytest.raises(ValueError, match="inside"):
        failing()
    assert [backend.fp32_precision for backend in backends] == before
    with _whole_float32(False):
        assert [backend.fp32_precision for backend in backends] == before
