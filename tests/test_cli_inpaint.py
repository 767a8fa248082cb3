"""``mdt-fast sample --image --mask``: pixels and latents, and every mistake in one line with exit code 2."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from autoencoders import save_tiny_vae
from mdt_fast.cli import main
from tiny import ARGUMENTS

TRAIN = ["train", "--preset=digits", *ARGUMENTS, "--batch-size=4", "--device=cpu", "--set=sample.steps=3"]
PIXELS = np.random.default_rng(0).integers(0, 256, (8, 8), dtype=np.uint8)
WHITE = np.zeros((8, 8), np.uint8)
WHITE[:, 4:] = 255


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``run``, and pictures and masks named after what they hold."""
    folder = tmp_path_factory.mktemp("inpaint")
    assert main([*TRAIN, "--steps=1", "--save-every=1", f"--out={folder / 'run'}"]) == 0
    pictures = {
        "x": PIXELS, "m": WHITE, "all": np.full_like(WHITE, 255), "none": np.zeros_like(WHITE),
        "big": np.kron(WHITE, np.ones((2, 2), np.uint8)), "colour": np.stack([PIXELS] * 3, axis=2),
    }  # fmt: skip
    for name, pixels in pictures.items():
        Image.fromarray(pixels).save(folder / f"{name}.png")
    np.save(folder / "x.npy", PIXELS[None].astype(np.float32) / 127.5 - 1)
    np.save(folder / "bad.npy", PIXELS.astype(np.float32))
    (folder / "header.npy").write_bytes((folder / "x.npy").read_bytes().replace(b"}", b" "))
    (folder / "zip.npy").write_bytes(b"PK\x03\x04")
    (folder / "text.png").write_text("no picture")
    return folder


@pytest.fixture(autouse=True)
def inside(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)


def filled(tmp_path: Path, *options: str, run: str = "run") -> np.ndarray:
    file = tmp_path / f"{len(os.listdir(tmp_path))}.npz"
    assert main(["sample", run, "--num-samples=3", "--device=cpu", f"--npz={file}", *options]) == 0
    with np.load(file) as saved:
        return saved["arr_0"]


@pytest.mark.parametrize("options", [[], ["--hide=1"], ["--sampler=ddpm", "--resample=2"]], ids=" ".join)
def test_the_known_pixels_are_kept_to_the_bit(tmp_path: Path, options: list[str]) -> None:
    images = filled(tmp_path, "--image=x.png", "--mask=m.png", *options)
    assert images.shape == (3, 8, 8, 1)
    assert (images[:, :, :4, 0] == PIXELS[:, :4]).all()
    assert (images[:, :, 4:, 0] != PIXELS[:, 4:]).any()
    again = filled(tmp_path, "--image=x.npy", "--mask=m.png", *options)
    assert abs(again.astype(int) - images).max() <= 1  # known floats are kept, then truncated to bytes


def test_an_all_white_mask_is_plain_sampling(tmp_path: Path) -> None:
    assert (filled(tmp_path, "--image=x.png", "--mask=all.png") == filled(tmp_path)).all()


def test_the_grid_shows_the_picture_first(tmp_path: Path) -> None:
    grids = [tmp_path / "with.png", tmp_path / "without.png"]
    for grid, options in zip(grids, (["--image=colour.png", "--mask=m.png"], [])):
        assert main(["sample", "run", "--num-samples=2", "--labels=3", f"--grid={grid}", *options]) == 0
    widths = [Image.open(grid).width for grid in grids]
    assert widths[0] - widths[1] == 2 * (56 + 4)


def test_a_folder_is_begun_with_one_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["sample", "run", "--num-samples=2", f"--out={tmp_path / 'o'}", "--image=x.png", "--mask=m.png"]
    assert main(command) == 0
    with np.load(next((tmp_path / "o").glob("samples_*.npz"))) as saved:
        assert (saved["arr_0"][:, :, :4, 0] == PIXELS[:, :4]).all()
    assert main(command) == 0
    for changed, says in (
        ([*command[:-1], "--mask=all.png"], "was begun with another --mask; resume with"),
        (command[:-2], "was begun with --image, now there is none; resume with"),
    ):
        assert main(changed) == 2
        assert says in capsys.readouterr().err


def test_a_latent_model_keeps_the_pixels(tmp_path: Path) -> None:
    """From a picture scaled down and cropped, with an autoencoder of two pixels per latent."""
    vae, run = save_tiny_vae(tmp_path / "vae"), tmp_path / "latent"
    pixels = np.random.default_rng(1).integers(0, 256, (20, 17, 3), dtype=np.uint8)
    (tmp_path / "photos/cat").mkdir(parents=True)
    for i in range(4):
        Image.fromarray(pixels).save(tmp_path / f"photos/cat/{i}.png")
    options = [f"--data={tmp_path / 'photos'}", "--image-size=16", f"--vae={vae}", *ARGUMENTS]
    training = ["train", *options, "--steps=1", "--batch-size=4", "--device=cpu", "--set=sample.steps=3"]
    assert main([*training, f"--out={run}"]) == 0
    mask = np.zeros((20, 17), np.uint8)
    mask[11:, 8:] = 255
    Image.fromarray(mask).save(tmp_path / "hole.png")
    given = [f"--image={tmp_path / 'photos/cat/0.png'}", f"--mask={tmp_path / 'hole.png'}"]
    images = filled(tmp_path, *given, run=str(run))
    kept = np.ones((16, 16), bool)
    kept[8:, 7:] = False  # a pixel that a white one touches is drawn
    assert (images[:, kept] == images[0, kept]).all()
    assert (images[0] != images[1])[~kept].any()

    latent = np.random.default_rng(2).standard_normal((4, 8, 8)).astype(np.float32)
    np.save(tmp_path / "latent.npy", latent)
    assert filled(tmp_path, f"--image={tmp_path / 'latent.npy'}", "--mask=m.png", run=str(run)).shape[1:] == (
        16, 16, 3,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--image=x.png"], "--image: also needs --mask"),
        (["--mask=m.png"], "--mask: also needs --image"),
        (["--hide=1"], "--hide: also needs --image"),
        (["--image=", "--mask=m.png"], "--image: got '', expected a name"),
        (["--image=no.png", "--mask=m.png"], "cannot read image 'no.png'"),
        (["--image=text.png", "--mask=m.png"], "cannot read image 'text.png'"),
        (["--image=x.png", "--mask=text.png"], "cannot read image 'text.png'"),
        (["--image=x.png", "--mask=big.png"], "--mask: 16x16 pixels, but --image has 8x8; they must match"),
        (["--image=x.png", "--mask=m.png", "--grid=./x.png"], "--image: got 'x.png', which would be"),
        (["--image=x.png", "--mask=m.png", "--grid=m.png"], "--mask: got 'm.png', which would be"),
        (["--image=x.png", "--mask=none.png"], "--mask: has no white, so there is nothing to fill in"),
        (["--image=no.npy", "--mask=m.png"], "--image: cannot read 'no.npy'"),
        (["--image=header.npy", "--mask=m.png"], "--image: cannot read 'header.npy'"),
        (["--image=zip.npy", "--mask=m.png"], "--image: cannot read 'zip.npy'"),
        (["--image=bad.npy", "--mask=m.png"], "--image: a .npy needs floats [1, 8, 8], got float"),
        (["--image=x.npy", "--mask=big.png"], "--mask: 16x16 pixels, but --image has 8x8"),
        (["--image=x.png", "--mask=m.png", "--hide=2"], "hide: got 2.0, expected 0 to 1"),
        (["--image=x.png", "--mask=all.png", "--hide=1"], "hide: everything is unknown"),
        (["--image=x.png", "--mask=m.png", "--resample=0"], "--resample: got 0, expected an integer"),
        (["--image=x.png", "--mask=m.png", "--resample=2", "--sampler=dpm++"], "resample: dpm++ uses ear"),
    ],
)  # fmt: skip
def test_a_mistake_ends_in_one_line(
    capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    capsys.readouterr()
    assert main(["sample", "run", "--num-samples=1", "--grid=g.png", *options]) == 2
    captured = capsys.readouterr().err
    assert message in captured
    assert captured.count("\n") == 1
    assert not Path("g.png").exists()


def test_a_mistake_begins_no_folder(tmp_path: Path) -> None:
    """Its settings would then refuse the right command."""
    command = ["sample", "run", "--num-samples=1", f"--out={tmp_path / 'o'}", "--image=x.png", "--mask=m.png"]
    assert main([*command, "--hide=2"]) == 2
    assert not (tmp_path / "o").exists()
