"""Webdatasets: the same samples as a folder of the same images, and every damage by name."""

import io
import json
import random
import tarfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mdt_fast.config import DataConfig
from mdt_fast.data import WebDataset, open_images
from mdt_fast.errors import UserError

CONFIG = DataConfig(source="", image_size=8, channels=3)


def picture(seed: int, kind: str = "PNG") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (12, 10, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def write_tar(path: Path, members: Sequence[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return path


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Two shards with 5 images in classes 0 to 2, and whatever else such shards hold."""
    a = [
        ("n0/a.png", picture(0)),
        ("n0/a.cls", b"2\n"),
        ("n0/a.txt", b"a caption"),
        ("b.JPEG", picture(1, "JPEG")),
    ]
    a += [("b.json", json.dumps({"label": 0, "more": [1]}).encode()), ("notes.json", b"[]"), (".c.png", b"")]
    b = [("2.gif", picture(2, "GIF")), ("2.cls", b"1"), ("1.jpg", picture(3, "JPEG")), ("1.cls", b"0")]
    b += [("x.y.z/3.png", picture(4)), ("x.y.z/3.cls", b"2")]
    write_tar(tmp_path / "set" / "00001.tar", b)
    write_tar(tmp_path / "set" / "00000.tar", a)
    return tmp_path / "set"


def opened(root: Path) -> WebDataset:
    images = open_images(replace(CONFIG, source=str(root)))
    assert isinstance(images, WebDataset)
    return images


def test_samples_are_those_of_the_folder_with_the_same_files(shards: Path, tmp_path: Path) -> None:
    images = opened(shards)
    assert images.labels.tolist() == [2, 0, 1, 0, 2]
    assert images.labels.dtype == np.int64
    assert images.classes == ("0", "1", "2")
    names = [
        "00000.tar/n0/a.png",
        "00000.tar/b.JPEG",
        "00001.tar/2.gif",
        "00001.tar/1.jpg",
        "00001.tar/x.y.z/3.png",
    ]
    assert [images.member(i)[0] for i in range(5)] == names
    for shard in shards.glob("*.tar"):
        with tarfile.open(shard) as tar:
            tar.extractall(tmp_path / "files" / shard.name, filter="data")
    for index, name in enumerate(names):
        (tmp_path / "one" / str(index)).mkdir(parents=True)
        file = tmp_path / "files" / name
        assert images.member(index)[1] == file.stat().st_size
        file.rename(tmp_path / "one" / str(index) / file.name)
    folder = open_images(replace(CONFIG, source=str(tmp_path / "one")))
    for index in range(5):
        for mirror in (False, True):
            expected = folder.load(index, random.Random(0), mirror)
            np.testing.assert_array_equal(images.load(index, random.Random(0), mirror), expected)


def test_many_threads_read_one_set(shards: Path) -> None:
    images = opened(shards)
    expected = [images.load(i, random.Random(0)) for i in range(5)]
    with ThreadPoolExecutor(8) as pool:
        for i, pixels in enumerate(pool.map(lambda i: images.load(i % 5, random.Random(0)), range(200))):
            np.testing.assert_array_equal(pixels, expected[i % 5])


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("classes.txt", "cat\ndog\nowl\n"),
        ("classes.json", '["cat", "dog", "owl"]'),
        ("classes.json", '{"1": "dog", "0": "cat", "2": "owl"}'),
    ],
    ids=["txt", "list", "object"],
)
def test_class_names_lie_beside_the_shards(shards: Path, file: str, text: str) -> None:
    (shards / file).write_text(text)
    assert opened(shards).classes == ("cat", "dog", "owl")


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("classes.txt", "cat\ndog\n", "classes.txt: names 2 classes, but the images have indices up to 2"),
        ("classes.json", '{"a": "cat"}', "classes.json: expected a list of class names"),
        ("classes.json", "[", "classes.json: expected a list of class names"),
    ],
)
def test_class_names_that_do_not_fit(shards: Path, file: str, text: str, message: str) -> None:
    (shards / file).write_text(text)
    with pytest.raises(UserError, match=message):
        opened(shards)


PNG = picture(0)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([], r"no images in the 1 \.tar shards of '.*bad'"),
        ([("a.txt", b"x")], r"no images in the 1 \.tar shards"),
        ([("a.png", PNG)], r"0\.tar: 'a\.png' has no class; a\.cls or a\.json is needed"),
        ([("a.cls", b"1"), ("b.png", PNG), ("b.cls", b"0")], r"'a\.cls' has no image"),
        ([("a.png", PNG), ("a.cls", b"cat")], r"0\.tar/a\.cls: got 'cat', expected a class index"),
        ([("a.png", PNG), ("a.cls", b"-1")], r"a\.cls: class indices are 0 to 99999, got -1"),
        ([("a.png", PNG), ("a.cls", b"9" * 20)], r"a\.cls: class indices are 0 to"),
        ([("a.png", PNG), ("a.json", b'{"label": "1"}')], r"a\.json: got .*, expected a class index"),
        ([("a.png", PNG), ("a.json", b'{"label": true}')], r"a\.json: got .*, expected a class index"),
        ([("a.png", PNG), ("a.json", b"[" * 9999)], r"a\.json: got .*, expected a class index"),
        ([("a.png", PNG), ("a.cls", b"1" * (1 << 21))], r"a\.cls: not a class index, it has 2097152 bytes"),
        ([("a.png", PNG), ("a.jpg", PNG), ("a.cls", b"0")], r"two images with one key: 'a\.png', 'a\.jpg'"),
    ],
    ids=lambda value: "" if isinstance(value, list) else value.replace("\\", "")[:40],
)
def test_what_is_no_labelled_image_is_named(
    tmp_path: Path, members: list[tuple[str, bytes]], message: str
) -> None:
    write_tar(tmp_path / "bad" / "0.tar", members)
    with pytest.raises(UserError, match=message) as caught:
        opened(tmp_path / "bad")
    assert "\n" not in str(caught.value)


def test_images_alone_are_enough_without_classes(tmp_path: Path) -> None:
    members = [("a.png", PNG), ("a.txt", b"a cat"), ("b.png", PNG), ("b.json", b'{"caption": "a dog"}')]
    write_tar(tmp_path / "0.tar", members)
    config = DataConfig(source=str(tmp_path), image_size=8, conditional=False)
    images = open_images(config)
    assert (images.labels.tolist(), images.classes) == ([0, 0], ("images",))


@pytest.mark.parametrize("name", ["cat/1.png", "cat_1.JPEG", "a/b/c/1.gif"])
def test_images_beside_shards_are_not_left_out_silently(shards: Path, name: str) -> None:
    (shards / "a").mkdir()
    (shards / "a" / "notes.txt").touch()
    (shards / ".hidden").mkdir()
    (shards / ".hidden" / "0.png").write_bytes(picture(0))
    assert len(opened(shards).labels) == 5
    (shards / name).parent.mkdir(parents=True, exist_ok=True)
    (shards / name).write_bytes(picture(0))
    with pytest.raises(UserError) as caught:
        opened(shards)
    assert str(caught.value) == (
        f"data.source: got {str(shards)!r}, with images ({name!r}) and .tar shards ('00000.tar'), expected "
        "only one kind"
    )


def test_pictures_of_runs_and_broken_links_beside_shards_do_not_count(shards: Path) -> None:
    for name in ("preview.png", "run/samples.png", "other/nowhere"):
        (shards / name).parent.mkdir(exist_ok=True)
        (shards / name).write_bytes(picture(0))
    (shards / "run" / "metrics.jsonl").touch()
    (shards / "other" / "nowhere").unlink()
    (shards / "other" / "nowhere").symlink_to("gone")
    assert len(opened(shards).labels) == 5
    (shards / "other" / "zoo").mkdir()
    (shards / "other" / "zoo" / "1.png").write_bytes(picture(0))
    with pytest.raises(UserError, match="expected only one kind"):
        opened(shards)


def test_a_truncated_shard_is_named_wherever_it_ends(shards: Path) -> None:
    path = shards / "00001.tar"
    whole = path.read_bytes()
    with tarfile.open(path) as tar:
        end = max(member.offset_data + member.size for member in tar) + 511 & ~511
    for size in [0, 1, 511, 512, 700, *range(1024, end + 1, 512), end + 100]:
        path.write_bytes(whole[:size])
        with pytest.raises(UserError, match=r"00001\.tar: truncated, damaged or not a plain \.tar file"):
            opened(shards)
    path.write_bytes(whole[: end + 512])
    assert len(opened(shards).labels) == 5


def test_other_files_named_tar_are_named(shards: Path) -> None:
    for content in (b"not a tar file" * 100, picture(0)):
        (shards / "2.tar").write_bytes(content)
        with pytest.raises(UserError, match=r"2\.tar: truncated, damaged or not a plain"):
            opened(shards)
    with tarfile.open(shards / "2.tar", "w:gz") as tar:
        tar.add(shards / "00000.tar")
    with pytest.raises(UserError, match=r"2\.tar: truncated, damaged or not a plain"):
        opened(shards)


def test_links_and_paths_in_a_shard_lead_nowhere(tmp_path: Path) -> None:
    """Only regular members count, whatever their names, and none is written to disk."""
    (tmp_path / "secret.png").write_bytes(picture(9))
    root = tmp_path / "set"
    root.mkdir()
    with tarfile.open(root / "0.tar", "w") as tar:
        for name, kind in (
            ("a.png", tarfile.SYMTYPE),
            ("c.png", tarfile.LNKTYPE),
            ("d.png", tarfile.FIFOTYPE),
        ):
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = kind, str(tmp_path / "secret.png")
            tar.addfile(entry)
        for name, content in (("../../b.png", picture(1)), ("../../b.cls", b"0")):
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    before = sorted(tmp_path.rglob("*"))
    images = opened(root)
    assert [images.member(i)[0] for i in range(len(images.labels))] == ["0.tar/../../b.png"]
    images.load(0, random.Random(0))
    assert sorted(tmp_path.rglob("*")) == before


def test_a_bad_image_and_a_shard_cut_short_since_are_named_when_read(shards: Path) -> None:
    write_tar(shards / "2.tar", [("a.png", b"no image"), ("a.cls", b"0")])
    images = opened(shards)
    with pytest.raises(UserError, match=r"cannot read image '.*2\.tar/a\.png'"):
        images.load(5, random.Random(0))
    with open(shards / "00001.tar", "r+b") as file:
        file.truncate(600)
    with pytest.raises(UserError, match=r"00001\.tar: truncated, it ends before byte"):
        images.load(4, random.Random(0))
