"""Images in: listing, classes, crops bit for bit as the official data loader, and clear errors."""

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from golden_files import load
from mdt_fast.config import DataConfig
from mdt_fast.data import check_classes, open_images
from mdt_fast.data.images import center_crop, list_images, random_crop
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


def test_listing_is_recursive_sorted_and_knows_four_endings(tmp_path: Path) -> None:
    for name in ("b/2.PNG", "a/x.jpg", "a/deep/y.JPEG", "c.gif", "notes.txt", ".hidden/z.png", "a/.z.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = [str(path.relative_to(tmp_path)) for path in list_images(tmp_path)]
    assert found == ["a/deep/y.JPEG", "a/x.jpg", "b/2.PNG", "c.gif"]


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


def test_digits_have_one_size() -> None:
    with pytest.raises(UserError, match="the digits are 8x8 with 1 channel, got image_size=16"):
        open_images(DataConfig(image_size=16))


def test_more_classes_than_the_model_has() -> None:
    check_classes(["a", "b"], 2)
    with pytest.raises(UserError, match=r"3 classes, the model only 2; use --set model.num_classes=3"):
        check_classes(["a", "b", "c"], 2)
