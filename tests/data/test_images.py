"""Images in: listing, classes, crops that equal the official data loader's bit for bit, and clear errors."""

import os
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from golden_files import load
from mdt_fast.config import DataConfig
from mdt_fast.data import check_classes, open_images
from mdt_fast.data.images import SUFFIXES, center_crop, list_images, random_crop, read_image
from mdt_fast.errors import UserError

FOLDER = DataConfig(source="", image_size=8, channels=3)


def write_image(path: Path, size: tuple[int, int] = (12, 10), color: int = 100) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (color, color // 2, 0)).save(path)
    return path


@pytest.mark.parametrize("i", range(5))
def test_crops_of_golden_data(i: int) -> None:
    saved = {key: value.numpy() for key, value in load("data").items()}
    image, center = Image.fromarray(saved[f"crop{i}/img"]), saved[f"crop{i}/center"]
    np.testing.assert_array_equal(center_crop(image, len(center)), center)
    rng = random.Random(100 + i)
    np.testing.assert_array_equal(random_crop(image, len(center), rng), saved[f"crop{i}/random"])


def test_listing_is_recursive_sorted_and_knows_what_torchvision_reads(tmp_path: Path) -> None:
    for name in (
        "b/2.PNG",
        "a/x.jpg",
        "a/deep/y.JPEG",
        "c.gif",
        "d/1.webp",
        "d/2.tif",
        "notes.txt",
        ".hidden/z.png",
        "a/.z.png",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = [str(path.relative_to(tmp_path)) for path in list_images(tmp_path)]
    assert found == ["a/deep/y.JPEG", "a/x.jpg", "b/2.PNG", "c.gif", "d/1.webp", "d/2.tif"]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_listed_ending_is_read(suffix: str, tmp_path: Path) -> None:
    pixels = np.full((9, 7), 200, dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / f"x{suffix}")
    assert list_images(tmp_path) == [tmp_path / f"x{suffix}"]
    assert np.abs(np.asarray(read_image(tmp_path / f"x{suffix}", 1)).astype(int) - 200).max() <= 3


def test_classes_are_folders_or_prefixes_in_string_order(tmp_path: Path) -> None:
    for folder in ("2", "10", "cat"):
        write_image(tmp_path / "folders" / folder / "under_score.png")
    images = open_images(replace(FOLDER, source=str(tmp_path / "folders")))
    assert (images.classes, images.labels.tolist()) == (("10", "2", "cat"), [0, 1, 2])

    for name in ("n02_1.jpg", "n01_7.png", "n02_a_b.png"):
        write_image(tmp_path / "flat" / name)
    images = open_images(replace(FOLDER, source=str(tmp_path / "flat")))
    assert (images.classes, images.labels.tolist()) == (("n01", "n02"), [0, 1, 1])


@pytest.mark.parametrize("channels", [1, 3])
def test_pixels_are_float32_chw_in_minus_one_to_one(tmp_path: Path, channels: int) -> None:
    write_image(tmp_path / "a_1.png", color=200)
    images = open_images(replace(FOLDER, source=str(tmp_path), channels=channels))
    pixels = images.load(0, random.Random(0))
    assert (pixels.shape, pixels.dtype) == ((channels, 8, 8), np.float32)
    expected = [200 / 127.5 - 1, 100 / 127.5 - 1, -1.0] if channels == 3 else [118 / 127.5 - 1]
    np.testing.assert_allclose(pixels[:, 4, 4], expected, atol=0.01)


def test_digits_are_sixteen_levels_of_grey() -> None:
    images = open_images(DataConfig())
    pixels = np.stack([images.load(i, random.Random(0)) for i in range(len(images.labels))])
    assert pixels.shape == (1797, 1, 8, 8)
    np.testing.assert_array_equal(np.unique(pixels), np.arange(17) / 8 - 1)
    assert np.bincount(images.labels).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]


def test_folders_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    file = write_image(tmp_path / "one" / "noprefix.png")
    for source, message in (
        (tmp_path / "nowhere", "no folder '.*nowhere'"),
        (tmp_path / "empty", "no images .* in '.*empty'"),
        (file, "is a file"),
        (tmp_path / "one", "cannot tell the class of 'noprefix.png'"),
        ("", "no images given"),
    ):
        with pytest.raises(UserError, match=message):
            open_images(replace(FOLDER, source=str(source)))


@pytest.mark.parametrize("content", [b"", b"not an image", "half"], ids=["empty", "text", "truncated"])
def test_an_unreadable_image_is_named(tmp_path: Path, content: bytes | str) -> None:
    path = write_image(tmp_path / "a_1.png", size=(40, 40))
    path.write_bytes(path.read_bytes()[:60] if content == "half" else content)  # type: ignore[arg-type]
    images = open_images(replace(FOLDER, source=str(tmp_path)))
    with pytest.raises(UserError, match=r"cannot read image '.*a_1\.png'") as caught:
        images.load(0, random.Random(0))
    assert "\n" not in str(caught.value)


def test_linked_class_folders_count_and_link_loops_end(tmp_path: Path) -> None:
    write_image(tmp_path / "elsewhere" / "1.png")
    write_image(tmp_path / "photos" / "cat" / "2.png")
    for name, target in (("dog", "../elsewhere"), ("hen", "../elsewhere"), ("loop", "."), ("cat/up", ".")):
        (tmp_path / "photos" / name).symlink_to(tmp_path / "photos" / target)
    found = [str(path.relative_to(tmp_path / "photos")) for path in list_images(tmp_path / "photos")]
    assert found == ["cat/2.png", "dog/1.png", "hen/1.png"]


@pytest.mark.parametrize("name", ["photos", "b"])
def test_an_unreadable_folder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    root = tmp_path / "photos"
    write_image(root / "a" / "1.png")
    write_image(root / "b" / "2.png")
    scandir = os.scandir

    def refuse(path: Path):  # type: ignore[no-untyped-def]
        if Path(path).name == name:
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)  # root could read every folder, whatever its mode
    with pytest.raises(UserError, match=rf"data.source: cannot read '.*{name}': Permission denied"):
        list_images(root)


def test_a_broken_link_is_no_missing_class(tmp_path: Path) -> None:
    write_image(tmp_path / "a" / "1.png")
    (tmp_path / "a" / "2.png").symlink_to(tmp_path / "gone.png")
    images = open_images(replace(FOLDER, source=str(tmp_path)))
    with pytest.raises(UserError, match=r"cannot read image '.*2\.png'"):
        images.load(1, random.Random(0))
    (tmp_path / "b").symlink_to(tmp_path / "gone")
    with pytest.raises(UserError, match=r"data.source: cannot read '.*b': No such file"):
        list_images(tmp_path)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("dtype", [np.dtype("<u2"), np.dtype(">u2"), np.dtype(np.int32)], ids=str)
def test_16_bit_grey_keeps_its_levels(tmp_path: Path, dtype: np.dtype, channels: int) -> None:
    levels = np.repeat(np.arange(0, 65536, 257), 4).reshape(32, 32).astype(dtype)
    Image.fromarray(levels).save(tmp_path / "a.png", format="TIFF" if dtype.str != "<u2" else "PNG")
    pixels = np.asarray(read_image(tmp_path / "a.png", channels)).reshape(32, 32, channels)
    for channel in range(channels):
        np.testing.assert_array_equal(pixels[..., channel], levels // 257)


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (np.ones((4, 4), np.float32), "floating-point pixels"),
        (np.full((4, 4), 65536, np.int32), "pixel values 65536 to 65536; 16-bit pixels are 0 to 65535"),
        (np.full((4, 4), -1, np.int32), "pixel values -1 to -1"),
    ],
)
def test_pixels_beyond_16_bits_are_refused(tmp_path: Path, pixels: np.ndarray, message: str) -> None:
    Image.fromarray(pixels).save(tmp_path / "a.png", format="TIFF")
    with pytest.raises(UserError, match=rf"a\.png': {message}"):
        read_image(tmp_path / "a.png", 3)


def test_a_sliver_is_refused_before_it_fills_the_memory(tmp_path: Path) -> None:
    Image.new("1", (3_000_000, 1)).save(tmp_path / "a_1.png")
    Image.new("L", (100, 1)).save(tmp_path / "a_2.png")
    images = open_images(replace(FOLDER, source=str(tmp_path)))
    with pytest.raises(
        UserError, match=r"a_1\.png': 3000000x1 pixels; the long side may be at most 100 times"
    ):
        images.load(0, random.Random(0))
    assert images.load(1, random.Random(0)).shape == (3, 8, 8)


def test_running_out_of_memory_names_the_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_image(tmp_path / "a_1.png")
    images = open_images(replace(FOLDER, source=str(tmp_path)))

    def exhaust(*args: object, **kwargs: object) -> None:
        raise MemoryError

    monkeypatch.setattr(Image.Image, "resize", exhaust)
    with pytest.raises(UserError, match=r"a_1\.png' of 12x10 pixels to data.image_size=8: out of memory"):
        images.load(0, random.Random(0))
    monkeypatch.setattr(Image.Image, "convert", exhaust)
    with pytest.raises(UserError, match=r"cannot read image '.*a_1\.png': MemoryError"):
        images.load(0, random.Random(0))


@pytest.mark.parametrize("error", [NotImplementedError, Image.DecompressionBombError, KeyError])
def test_whatever_a_decoder_raises_the_image_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    def fail(*args: object) -> None:
        raise error("pixel format 0")

    path = write_image(tmp_path / "a.png")
    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(UserError, match=r"cannot read image '.*a\.png': .*pixel format 0"):
        read_image(path, 3)


def test_digits_have_one_size() -> None:
    with pytest.raises(UserError, match="the digits are 8x8 with 1 channel, got image_size=16"):
        open_images(DataConfig(image_size=16))


def test_digits_are_not_cropped() -> None:
    with pytest.raises(
        UserError, match=r"^data\.crop: got 'random', expected 'center': the digits are used whole"
    ):
        open_images(DataConfig(crop="random"))


def test_more_classes_than_the_model_has() -> None:
    check_classes(["a", "b"], 2)
    with pytest.raises(UserError, match=r"3 classes, but the model only 2; use --set model.num_classes=3"):
        check_classes(["a", "b", "c"], 2)
