"""An encoded set as training reads it: what the autoencoder gives, and every damage by name."""

import json
import random
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mdt_fast.config import DataConfig
from mdt_fast.data import Autoencoder, LatentSet, Loader, open_images
from mdt_fast.data.encode import encode
from mdt_fast.data.latents import read_signed, sign
from mdt_fast.errors import UserError

RNG = random.Random(0)


def write_photos(root: Path, count: int = 11) -> Path:
    """``count`` images of different sizes in the classes "b" and "a"."""
    for index in range(count):
        pixels = np.random.default_rng(index).integers(0, 256, (20 + index, 18, 3), dtype=np.uint8)
        folder = root / ("a" if index % 3 else "b")
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / f"{index:02}.png")
    return root


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_photos(tmp_path_factory.mktemp("photos") / "photos")


@pytest.fixture(scope="module")
def config(photos: Path, tiny_vae: Path) -> DataConfig:
    return DataConfig(source=str(photos), image_size=16, channels=3, vae=str(tiny_vae), flip=True)


@pytest.fixture(scope="module")
def encoded(config: DataConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("encoded") / "latents"
    encode(config, out, batch_size=2, shard_size=4)
    return out


@pytest.fixture
def folder(encoded: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(encoded, tmp_path / "latents"))


def test_a_row_is_the_autoencoders_answer_to_the_image_and_to_its_mirror(
    config: DataConfig, encoded: Path, tiny_vae: Path
) -> None:
    vae, images = Autoencoder.load(tiny_vae), open_images(config)
    latents = open_images(replace(config, source=str(encoded)))
    assert isinstance(latents, LatentSet)
    assert (latents.channels, latents.size, latents.image_size) == (4, 8, 16)
    assert (latents.scale, latents.shift, latents.in_memory) == (0.18215, 0.0, False)
    assert (latents.autoencoder, latents.fingerprint) == (str(tiny_vae), vae.fingerprint)
    assert latents.classes == images.classes == ("a", "b")
    np.testing.assert_array_equal(latents.labels, images.labels)
    for index in range(11):
        for mirror in (False, True):
            pixels = torch.from_numpy(images.load(index, RNG, mirror))
            row = latents.load(index, RNG, mirror)
            assert (row.shape, row.dtype) == ((8, 8, 8), np.float32)
            np.testing.assert_allclose(row, vae.moments(pixels[None])[0], atol=2e-6, rtol=2e-6)


def test_the_loader_serves_it(config: DataConfig, encoded: Path) -> None:
    latents = open_images(replace(config, source=str(encoded)))
    x, y = next(Loader(latents, config, batch_size=11, seed=0).batches(0, 1))
    assert (x.shape, x.dtype) == ((11, 8, 8, 8), torch.float32)
    assert sorted(y.tolist()) == sorted(latents.labels.tolist())


def test_many_threads_read_one_set(encoded: Path) -> None:
    latents = LatentSet(encoded)
    expected = [latents.load(i, RNG) for i in range(11)]
    with ThreadPoolExecutor(8) as pool:
        for i, row in enumerate(pool.map(lambda i: latents.load(i % 11, RNG), range(500))):
            np.testing.assert_array_equal(row, expected[i % 11])


def test_float16_is_half_the_size_and_rounds_once(config: DataConfig, encoded: Path, tmp_path: Path) -> None:
    encode(config, tmp_path / "half", batch_size=2, shard_size=4, dtype="float16")
    half, single = LatentSet(tmp_path / "half"), LatentSet(encoded)
    assert half.digest != single.digest
    for index in range(11):
        row = half.load(index, RNG, True)
        assert row.dtype == np.float32
        np.testing.assert_array_equal(
            row, single.load(index, RNG, True).astype(np.float16).astype(np.float32)
        )
    assert half.shards[0].bytes < 0.55 * single.shards[0].bytes


def test_without_mirrors(config: DataConfig, encoded: Path, tmp_path: Path) -> None:
    encode(config, tmp_path / "plain", batch_size=2, shard_size=4, mirror=False)
    plain = LatentSet(tmp_path / "plain")
    np.testing.assert_array_equal(plain.load(10, RNG), LatentSet(encoded).load(10, RNG))
    with pytest.raises(UserError, match=r"data\.flip: .* was encoded without mirrors"):
        plain.load(0, RNG, True)
    with pytest.raises(UserError, match=r"data\.flip: .* was encoded without mirrors"):
        open_images(replace(config, source=str(tmp_path / "plain")))
    assert isinstance(open_images(replace(config, source=str(tmp_path / "plain"), flip=False)), LatentSet)


def test_a_configuration_that_does_not_fit_is_refused(config: DataConfig, encoded: Path) -> None:
    for change, message in (
        ({"image_size": 8}, r"data\.image_size: the latents in '.*' are from 16x16 pixels, got 8"),
        ({"crop": "random"}, r"data\.crop: '.*' holds center crops"),
    ):
        with pytest.raises(UserError, match=message):
            open_images(replace(config, source=str(encoded), **change))


def test_digits_are_encoded_as_grey_in_rgb(tiny_vae: Path, tmp_path: Path) -> None:
    digits = DataConfig(vae=str(tiny_vae))
    encode(digits, tmp_path / "digits", mirror=False, batch_size=256)
    latents, images = LatentSet(tmp_path / "digits"), open_images(digits)
    assert (len(latents.labels), latents.channels, latents.size) == (1797, 4, 4)
    pixels = torch.from_numpy(images.load(7, RNG)).expand(1, 3, 8, 8)
    expected = Autoencoder.load(tiny_vae).moments(pixels)[0]
    np.testing.assert_allclose(latents.load(7, RNG), expected, atol=2e-6, rtol=2e-6)


def edit_index(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """An edit of the index by somebody who signs it again."""

    def edit(folder: Path) -> None:
        values = read_signed(folder / "index.json")
        del values["sha256"]
        change(values)
        (folder / "index.json").write_text(sign(values))

    return edit


def replace_in(name: str, old: bytes, new: bytes) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        content = (folder / name).read_bytes()
        assert old in content
        (folder / name).write_bytes(content.replace(old, new, 1))

    return edit


def cut(name: str, size: int) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size]) and None


SHARD = "shard-00001.safetensors"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda folder: (folder / "index.json").unlink(),
            r"index\.json: missing, encoding is not finished",
        ),
        (cut("index.json", 300), r"index\.json: truncated or edited, it is not JSON"),
        (cut("index.json", 0), r"index\.json: truncated or edited, it is not JSON"),
        (
            replace_in("index.json", b'"samples": 4', b'"samples": 3'),
            r"index\.json: edited or damaged, its own",
        ),
        (
            replace_in("index.json", b'"format": 1', b'"format": 2'),
            r"index\.json: format 2; .* reads format 1",
        ),
        (
            lambda folder: (folder / "index.json").write_text("[]"),
            r"index\.json: not written by mdt-fast encode",
        ),
        (lambda folder: (folder / SHARD).unlink(), r"shard-00001\.safetensors: missing"),
        (cut(SHARD, 999), r"shard-00001\.safetensors: truncated, 999 bytes where \d+ were written"),
        (
            lambda folder: (folder / SHARD).write_bytes(bytes(99999)),
            r"shard-00001\.safetensors: edited, 99999",
        ),
        (replace_in(SHARD, b"[4,8,8,8]", b"[2,8,8,8]"), r"shard-00001\.safetensors: edited, its header"),
        (replace_in(SHARD, b'"labels"', b'"label"s'), r"shard-00001\.safetensors: edited, its header"),
        (replace_in(SHARD, b"[0,", b"[9,"), r"shard-00001\.safetensors: edited, its header"),
        (edit_index(lambda index: index.pop("shards")), r"index\.json: edited, entries are missing"),
        (edit_index(lambda index: index["shards"].pop()), r"index\.json: edited, entries are missing"),
        (edit_index(lambda index: index["shards"][0].update(file="../x")), r"index\.json: edited, entries"),
        (
            edit_index(lambda index: index["shards"][0].update(samples=True)),
            r"samples: got True, expected int",
        ),
        (
            edit_index(lambda index: index["classes"].pop()),
            r"safetensors: edited, a label is not among the index",
        ),
        (edit_index(lambda index: index["encoding"].pop("side")), r"index\.json: edited, entries"),
        (edit_index(lambda index: index["encoding"].update(shard_size=0)), r"index\.json: edited, entries"),
        (edit_index(lambda index: index.update(encoding=[])), r"index\.json: got list, expected a table"),
    ],
)
def test_damage_is_named(folder: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(folder)
    with pytest.raises(UserError, match=message) as caught:
        LatentSet(folder)
    assert "\n" not in str(caught.value)


def test_verify_reads_every_byte(folder: Path) -> None:
    latents, seen = LatentSet(folder), []
    latents.verify(seen.append)
    assert seen == [1, 2, 3]
    for name in (SHARD, "shard-00002.safetensors"):
        content = bytearray((folder / name).read_bytes())
        content[-1] ^= 1
        (folder / name).write_bytes(content)
    with pytest.raises(
        UserError, match=r"2 of 3 shards do not match their SHA-256 .*: shard-00001.*shard-00002"
    ):
        LatentSet(folder).verify()


def test_a_shard_cut_short_while_it_is_read_is_named(folder: Path) -> None:
    latents = LatentSet(folder)
    cut(SHARD, 1000)(folder)
    latents.load(0, RNG)
    with pytest.raises(UserError, match=r"shard-00001\.safetensors: truncated, it ends before byte"):
        latents.load(5, RNG)


def test_the_files_are_safetensors_and_json(folder: Path) -> None:
    from safetensors.numpy import load_file

    index = json.loads((folder / "index.json").read_text())
    assert [entry["samples"] for entry in index["shards"]] == [4, 4, 3]
    tensors = load_file(folder / "shard-00002.safetensors")
    assert {name: tensor.shape for name, tensor in tensors.items()} == {
        "moments": (3, 8, 8, 8),
        "mirrored": (3, 8, 8, 8),
        "labels": (3,),
    }
    np.testing.assert_array_equal(tensors["mirrored"][1], LatentSet(folder).load(9, RNG, True))
