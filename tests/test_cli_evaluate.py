"""``mdt-fast evaluate`` as a person uses it: digits end to end, ADM's files, every mistake in one line."""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from feature_networks import MODULE, Small, forget
from mdt_fast.cli import main
from mdt_fast.evaluation import frechet_distance, inception_score, moments
from mdt_fast.evaluation import reference as evaluation_reference
from mdt_fast.sampling import save_npz

FAST = ["--device=cpu", "--threads=1"]
DIGITS = """
import torch
from sklearn.datasets import load_digits
from sklearn.neural_network import MLPClassifier

digits = load_digits()
trained = MLPClassifier((24,), max_iter=60, random_state=0).fit(digits.data / 16, digits.target)
weights = [torch.tensor(w).float() for w in trained.coefs_]
biases = [torch.tensor(b).float() for b in trained.intercepts_]

def features(images):
    x = images.flatten(1).float() / 255
    hidden = torch.relu(x @ weights[0] + biases[0])
    return {"pooled": hidden, "spatial": images.float(), "logits": hidden @ weights[1] + biases[1]}
"""


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*sys.path])
    (tmp_path / "mine.py").write_text(MODULE)
    yield
    forget("mine", "digit_features")


def pictures(count: int, seed: int, side: int = 8, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, channels), dtype=np.uint8)


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict:
    """The JSON (values, notes and so on) of a run that succeeds."""
    assert main(["evaluate", *arguments, "--json=out.json", *FAST]) == 0, capsys.readouterr().err
    return json.loads(Path("out.json").read_text())


def error(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    assert main(["evaluate", *arguments, *FAST]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("mdt-fast: error: ")
    assert captured.err.count("\n") == 1
    return captured.err.removeprefix("mdt-fast: error: ").rstrip("\n")


def test_digits_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """To a trained classifier, digits are nearer to digits than noise; files and batches do not matter."""
    from sklearn.datasets import load_digits

    Path("digit_features.py").write_text(DIGITS)
    digits = (load_digits().images * 255 / 16).round().astype(np.uint8)[..., None]
    save_npz(tmp_path / "one.npz", digits[::2], [0] * len(digits[::2]))
    save_npz(tmp_path / "noise.npz", pictures(500, 1, channels=1), [0] * 500)
    folder = tmp_path / "other"
    folder.mkdir()
    for index, image in enumerate(digits[1::2]):
        Image.fromarray(image[..., 0]).save(folder / f"{index:05}.png")

    features = "--features=digit_features:features"
    run(capsys, "other", features, "--save-features=other.safetensors")
    capsys.readouterr()
    good = run(capsys, "one.npz", "--reference=other.safetensors", features)
    table = capsys.readouterr().out
    assert all(
        name in table for name in ("fid", "sfid", "is", "precision", "recall", "899 images in one.npz")
    )
    bad = run(capsys, "noise.npz", "--reference=other.safetensors", features)
    again = run(capsys, "one.npz", "--reference=other", features, "--batch-size=101")
    for name, value in good["metrics"].items():
        assert again["metrics"][name] == pytest.approx(value, rel=1e-5)
    good, bad = good["metrics"], bad["metrics"]
    assert 0 < good["fid"] < 0.05 * bad["fid"]
    assert 0 < good["sfid"] < bad["sfid"]
    assert good["is"] > 5
    assert good["is"] > bad["is"]
    assert good["precision"] > 0.85
    assert good["recall"] > 0.85
    assert bad["precision"] < 0.3

    same = run(capsys, "other.safetensors", "--reference=other.safetensors")["metrics"]
    assert same["fid"] == pytest.approx(0, abs=1e-9)
    assert same["sfid"] == pytest.approx(0, abs=1e-5)
    assert (same["precision"], same["recall"]) == (1, 1)


def test_adms_reference_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its statistics give fid and sfid (channels last), its images give precision and recall."""
    many, few = pictures(80, 1), pictures(30, 2)
    pooled, spatial = Small()(torch.from_numpy(many).permute(0, 3, 1, 2))
    flat = spatial[:, :7].permute(0, 2, 3, 1).flatten(1).double()
    statistics = {
        "mu": pooled.double().mean(0), "sigma": np.cov(pooled.double(), rowvar=False),
        "mu_s": flat.mean(0), "sigma_s": np.cov(flat, rowvar=False),
    }  # fmt: skip
    np.savez(tmp_path / "adm.npz", arr_0=few, **statistics)
    np.savez_compressed(tmp_path / "statistics.npz", **statistics)
    save_npz(tmp_path / "many.npz", many, [0] * 80)
    bare = run(capsys, "many.npz", "--reference=statistics.npz", "--features=mine:Class")["metrics"]
    assert bare.keys() == {"fid", "sfid"}
    assert bare["fid"] == pytest.approx(0, abs=1e-6)
    assert bare["sfid"] == pytest.approx(0, abs=1e-4)
    notes = json.loads(Path("out.json").read_text())["notes"]
    assert any("comparable only if" in note for note in notes)
    assert any("is is skipped" in note for note in notes)
    assert any("sfid: 80 images in many.npz for 448 features" in note for note in notes)
    # A network other than Inception runs on the images, even with as many features as the statistics.
    seen = run(capsys, "many.npz", "--reference=adm.npz", "--features=mine:Class")
    features = [Small()(torch.from_numpy(images).permute(0, 3, 1, 2))[0] for images in (many, few)]
    assert seen["metrics"]["fid"] == pytest.approx(frechet_distance(*map(moments, features)), rel=1e-6)
    assert not any("statistics" in note for note in seen["notes"])
    # One with another number of features cannot use the statistics.
    mean = run(capsys, "many.npz", "--reference=adm.npz", "--features=mine:mean", "--metrics=fid")
    means = [torch.from_numpy(images).float().mean((1, 2)) for images in (many, few)]
    assert mean["metrics"]["fid"] == pytest.approx(frechet_distance(*map(moments, means)), rel=1e-6)
    assert not mean["notes"]
    monkeypatch.setattr(
        evaluation_reference, "is_published", lambda identity: identity.startswith("mine:Class")
    )
    whole = run(capsys, "many.npz", "--reference=adm.npz", "--features=mine:Class")
    assert {name: whole["metrics"][name] for name in ("fid", "sfid")} == bare
    assert 0 < whole["metrics"]["recall"] < 1
    said = "fid and sfid: computed from the statistics in adm.npz, whose images it does not contain"
    assert said in whole["notes"]
    # For saved features, no network is needed where the statistics are enough.
    run(capsys, "many.npz", "--features=mine:Class", "--save-features=many.safetensors")
    for metrics in ("fid", "fid,sfid"):
        again = run(capsys, "many.safetensors", "--reference=adm.npz", f"--metrics={metrics}")["metrics"]
        assert again == {name: bare[name] for name in metrics.split(",")}


def test_saved_features_are_what_was_seen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = pictures(20, 3)
    save_npz(tmp_path / "a.npz", images, [0] * 20)
    run(capsys, "a.npz", "--features=mine:module", "--save-features=a.safetensors", "--batch-size=7")
    saved = load_file("a.safetensors")
    pooled, _ = Small()(torch.from_numpy(images).permute(0, 3, 1, 2))
    torch.testing.assert_close(saved["pooled"], pooled)
    np.testing.assert_allclose(saved["covariance"], np.cov(pooled.double(), rowvar=False), rtol=1e-4)
    assert saved["probabilities"].shape == (20, 5)
    seen = run(capsys, "a.npz", "--metrics=is", "--features=mine:module")["metrics"]
    assert run(capsys, "a.safetensors", "--metrics=is")["metrics"] == pytest.approx(seen)


def test_a_folder_of_any_sizes_is_cropped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "photos").mkdir()
    for index, side in enumerate((9, 12, 20, 8, 8)):
        Image.fromarray(pictures(1, index, side)[0]).save(tmp_path / "photos" / f"{index}.png")
    save_npz(tmp_path / "a.npz", pictures(20, 3), [0] * 20)
    message = error(capsys, "photos", "--reference=photos", "--features=mine:mean")
    assert re.search(r"'photos/[1-4].png' is (8x8|12x12|20x20) RGB, '0.png' is 9x9 RGB; one size", message)
    found = run(capsys, "a.npz", "--reference=photos", "--image-size=8", "--features=mine:mean")
    assert found["reference"] == {"path": "photos", "count": 5, "shape": [8, 8, 3]}


@pytest.fixture
def files(tmp_path: Path) -> None:
    """Good and bad files, named after what is wrong with them."""
    save_npz(tmp_path / "good.npz", pictures(20, 1), [0] * 20)
    save_npz(tmp_path / "large.npz", pictures(20, 1, side=9), [0] * 20)
    save_npz(tmp_path / "one.npz", pictures(1, 1), [0])
    lit = pictures(20, 1) % 77
    lit[17, 3, 3, 0] = 77
    save_npz(tmp_path / "lit.npz", lit, [0] * 20)
    np.savez(tmp_path / "empty.npz")
    np.savez(tmp_path / "named.npz", arr0=pictures(9, 1), labels=np.arange(9))
    np.savez(tmp_path / "float.npz", pictures(9, 1).astype(np.float32))
    np.savez(tmp_path / "flat.npz", pictures(9, 1).reshape(9, -1))
    np.savez(tmp_path / "object.npz", np.array([{}], dtype=object))
    np.savez(tmp_path / "half.npz", mu=np.zeros(3))
    np.savez(tmp_path / "odd.npz", mu=np.zeros(3), sigma=np.eye(4))
    np.savez(tmp_path / "nan.npz", mu=np.zeros(3), sigma=np.eye(3) * np.nan)
    np.savez(tmp_path / "negative.npz", mu=np.zeros(3), sigma=-np.eye(3))
    np.savez(tmp_path / "wide.npz", mu=np.zeros(9), sigma=np.eye(9))
    np.savez(tmp_path / "flipped.npz", mu=np.zeros(300), sigma=np.eye(300))
    flipped = bytearray((tmp_path / "flipped.npz").read_bytes())
    flipped[len(flipped) // 2] ^= 1
    (tmp_path / "flipped.npz").write_bytes(flipped)
    (tmp_path / "torn.npz").write_bytes((tmp_path / "good.npz").read_bytes()[:500])
    save_npz(tmp_path / "header.npz", pictures(20, 1, side=32), [0] * 20)
    header = (tmp_path / "header.npz").read_bytes().replace(b"}", b" ", 1)
    (tmp_path / "header.npz").write_bytes(header)
    (tmp_path / "torn.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{}")
    (tmp_path / "text.txt").touch()
    (tmp_path / "none").mkdir()


REFUSED = [
    ("absent.npz", [], "SAMPLES: no file or folder 'absent.npz'"),
    ("text.txt", [], "SAMPLES: 'text.txt' is no .npz, no .safetensors of features and no folder of images"),
    ("none", [], "SAMPLES: no images (jpg, jpeg, png, gif, webp, bmp, tif, tiff, ppm, pgm) in 'none'"),
    ("empty.npz", [], "SAMPLES: 'empty.npz' holds nothing; arr_0 (images, uint8 [N, H, W, C]) or mu [D]"),
    ("named.npz", [], "'named.npz' holds arr0, labels (did you mean 'arr0'?); arr_0 (images"),
    ("float.npz", [], "arr_0 in 'float.npz' is float32 [9, 8, 8, 3]; images are uint8 [N, H, W, C]"),
    ("flat.npz", [], "arr_0 in 'flat.npz' is uint8 [9, 192]; images are"),
    ("object.npz", [], "cannot read 'object.npz' as .npz: it holds Python objects, which are not read"),
    ("torn.npz", [], "SAMPLES: cannot read 'torn.npz' as .npz: File is not a zip file"),
    ("header.npz", [], "SAMPLES: cannot read 'header.npz' as .npz: "),
    ("torn.safetensors", [], "SAMPLES: cannot read features from 'torn.safetensors'"),
    ("one.npz", [], "SAMPLES: at least 2 images are needed, 'one.npz' has 1"),
    ("good.npz", ["--reference=large.npz"], "'large.npz' are 9x9 RGB, those in 'good.npz' are 8x8 RGB"),
    ("good.npz", ["--reference=half.npz"], "--reference: 'half.npz' has mu; both mu and sigma are needed"),
    ("good.npz", ["--reference=flipped.npz"], "cannot read sigma in 'flipped.npz': Bad CRC-32"),
    ("good.npz", ["--reference=odd.npz"], "in 'odd.npz' mu is [3] and sigma [4, 4]; [D] and [D, D]"),
    ("good.npz", ["--reference=nan.npz"], "sigma in 'nan.npz' has values that are not finite"),
    ("good.npz", ["--reference=negative.npz"], "their covariance has the eigenvalue -1; none may be below 0"),
    ("good.npz", ["--reference=wide.npz"], "fid: 'good.npz' has 3 features, 'wide.npz' 9"),
    ("good.npz", ["--metrics=fid,precison"], "got 'precison' (did you mean 'precision'?)"),
    ("good.npz", ["--metrics=sfid"], "--metrics: sfid cannot be computed: 'good.npz' has no spatial"),
    ("good.npz", ["--metrics=is"], "is cannot be computed: the features of 'good.npz' come without class"),
    ("good.npz", ["--reference=nan.npz", "--batch-size=0"], "--batch-size: got 0, expected 1 or more"),
    ("good.npz", ["--image-size=8"], "--image-size: crops images in folders, but neither"),
    ("good.npz", ["--json=good.npz"], "'good.npz' is both an input and an output; choose another name"),
    ("good.npz", ["--weights=x.pth", "--json=x.pth"], "'x.pth' is both an input and an output; choose"),
    ("good.npz", ["--save-features=x.npz"], "got 'x.npz', expected a name that ends in .safetensors"),
    ("good.npz", ["--weights=x.pth"], "--weights: is for inception-v3-compat only"),
    ("", [], "SAMPLES: got '', expected a name") ,
    ("lit.npz", ["--features=mine:not_finite"], "the features of arr_0[17] in 'lit.npz' are not finite"),
]  # fmt: skip


@pytest.mark.parametrize(("samples", "options", "message"), REFUSED, ids=[row[2][:40] for row in REFUSED])
@pytest.mark.usefixtures("files")
def test_mistakes(samples: str, options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(Path().iterdir())
    names = [option.split("=")[0] for option in options]
    added = [] if "--reference" in names else ["--reference=good.npz"]
    added += [] if "--features" in names else ["--features=mine:mean"]
    assert message in error(capsys, samples, *options, *added)
    assert sorted(path for path in Path().iterdir() if path.name != "__pycache__") == before


def test_parts_of_an_inception_score_have_all_classes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder's names sort by class, so its images are spread over the parts; a file's keep their order."""
    monkeypatch.setattr(inception_score, "__defaults__", (50,))
    Path("by_shade.py").write_text(
        "import torch\ndef features(images):\n    shade = images[:, 0, 0, 0].long() // 50\n"
        "    hot = torch.nn.functional.one_hot(shade, 5).float()\n"
        "    return {'pooled': images.flatten(1).float(), 'probabilities': hot}\n"
    )
    images = pictures(250, 5)
    images[:, 0, 0, 0] = np.arange(250)
    (tmp_path / "drawn").mkdir()
    for index, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / "drawn" / f"{index // 50}_{index:04}.png")
    save_npz(tmp_path / "drawn.npz", images, [0] * 250)
    asked = ["--metrics=is", "--features=by_shade:features"]
    assert run(capsys, "drawn.npz", *asked)["metrics"]["is"] == pytest.approx(1)
    found = run(capsys, "drawn", *asked)["metrics"]
    assert found["is"] > 4.5
    assert run(capsys, "drawn", *asked, "--batch-size=7")["metrics"] == found


@pytest.mark.usefixtures("files")
def test_features_of_the_samples_outlive_a_bad_reference(capsys: pytest.CaptureFixture[str]) -> None:
    """They are saved first; and two different networks are refused before any image is read."""
    (Path("pair")).mkdir()
    Image.fromarray(pictures(1, 1)[0]).save("pair/1.png")
    Path("pair/2.png").write_bytes(b"no picture")
    save = ["--features=mine:mean", "--save-features=kept.safetensors"]
    assert "cannot read image 'pair/2.png'" in error(capsys, "good.npz", "--reference=pair", *save)
    assert load_file("kept.safetensors")["pooled"].shape == (20, 3)
    for sides in (["good.npz", "--reference=kept.safetensors"], ["kept.safetensors", "--reference=good.npz"]):
        message = error(capsys, *sides, "--features=mine:Class", "--save-features=none.safetensors")
        assert "they must come from the same network" in message
        assert not Path("none.safetensors").exists()


@pytest.mark.usefixtures("files")
def test_a_reference_is_needed_and_networks_must_agree(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--reference is needed for all metrics except 'is'" in error(capsys, "good.npz")
    assert "--reference is needed" in error(
        capsys, "good.npz", "--metrics=fid", "--save-features=a.safetensors"
    )
    run(capsys, "good.npz", "--features=mine:mean", "--save-features=mean.safetensors")
    message = error(capsys, "good.npz", "--reference=mean.safetensors", "--features=mine:Class")
    assert "its features come from 'mine:mean sha256:" in message
    assert "they must come from the same network" in message


@pytest.mark.usefixtures("files")
def test_torn_images_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_npz(tmp_path / "long.npz", pictures(300, 1), [0] * 300)
    whole = (tmp_path / "long.npz").read_bytes()
    (tmp_path / "flipped.npz").write_bytes(whole[:50000] + bytes([whole[50000] ^ 1]) + whole[50001:])
    assert "SAMPLES: arr_0 in 'flipped.npz' is damaged: Bad CRC-32" in error(
        capsys, "flipped.npz", "--reference=good.npz", "--features=mine:mean"
    )


@pytest.mark.usefixtures("files")
def test_three_images_have_a_distance_but_no_precision(capsys: pytest.CaptureFixture[str]) -> None:
    save_npz("three.npz", pictures(3, 1), [0] * 3)
    found = run(capsys, "three.npz", "--reference=good.npz", "--features=mine:mean")
    assert set(found["metrics"]) == {"fid"}
    assert "precision is skipped: 'three.npz' has 3 images; at least 4 are needed" in found["notes"]
