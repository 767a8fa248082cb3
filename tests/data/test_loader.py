"""Batches depend on (seed, step) alone; every sample comes once per epoch."""

import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from mdt_fast.config import DataConfig
from mdt_fast.data import Loader, open_images
from mdt_fast.errors import UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    """Ten noisy images in two classes."""
    root = tmp_path_factory.mktemp("images")
    noise = np.random.default_rng(0)
    for i in range(10):
        pixels = noise.integers(0, 256, (9, 11, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / f"{'ab'[i % 2]}_{i}.png")
    return DataConfig(source=str(root), image_size=8, channels=3, flip=True)


def loader(config: DataConfig, batch_size: int = 4, seed: int = 0) -> Loader:
    return Loader(open_images(config), config, batch_size=batch_size, seed=seed)


def equal(a: list[tuple[Tensor, Tensor]], b: list[tuple[Tensor, Tensor]]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, u) and torch.equal(y, v) for (x, y), (u, v) in zip(a, b))


@pytest.mark.parametrize("crop", ["center", "random"])
@pytest.mark.parametrize("source", ["folder", "digits"])
def test_starting_later_gives_the_same_batches(folder: DataConfig, source: str, crop: str) -> None:
    config = replace(folder, crop=crop) if source == "folder" else DataConfig(flip=True)
    whole = list(loader(config).batches(0, 7))
    assert equal(whole[3:], list(loader(config).batches(3, 7)))
    assert equal(whole, list(loader(config).batches(0, 7)))
    assert not equal(whole, list(loader(config, seed=1).batches(0, 7)))


@pytest.mark.parametrize("source", ["folder", "digits"])
@pytest.mark.parametrize(("chunk", "workers"), [(1, 1), (3, 2), (32, 1), (32, 3)])
def test_who_reads_how_many_rows_at_once_changes_nothing(
    folder: DataConfig, source: str, chunk: int, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every row is what the set's ``load`` gives for its sample, crop and mirror, in order."""
    monkeypatch.setattr("mdt_fast.data.loader.CHUNK", chunk)
    config = replace(folder, crop="random") if source == "folder" else DataConfig(flip=True)
    config = replace(config, workers=workers)
    images = open_images(config)
    own = Loader(images, config, batch_size=11, seed=2, rows=slice(3, 10))
    for step, (x, y) in enumerate(own.batches(4, 8), 4):
        assert (x.dtype, y.dtype, len(x)) == (torch.float32, torch.int64, 7)
        for row, (index, crop, mirror) in enumerate(own._samples(step)):
            assert torch.equal(x[row], torch.from_numpy(images.load(index, random.Random(crop), mirror)))
            assert y[row] == images.labels[index]


@pytest.mark.gpu
def test_batches_in_page_locked_memory(folder: DataConfig) -> None:
    pinned = Loader(open_images(folder), folder, batch_size=4, seed=0, pinned=True)
    found = list(pinned.batches(0, 7))
    assert all(x.is_pinned() and y.is_pinned() for x, y in found)
    assert equal(found, list(loader(folder).batches(0, 7)))


def test_every_sample_once_per_epoch_across_straddling_batches(folder: DataConfig) -> None:
    batches = loader(folder)
    stream = [index for step in range(15) for index in batches.indices(step)]
    for epoch in range(6):
        assert sorted(stream[10 * epoch : 10 * epoch + 10]) == list(range(10))
    assert stream[:10] != stream[10:20]


def test_a_batch_may_be_larger_than_the_set(folder: DataConfig) -> None:
    assert set(Counter(loader(folder, batch_size=30).indices(1)).values()) == {3}


def test_labels_belong_to_their_images_and_half_are_flipped(folder: DataConfig) -> None:
    images = open_images(folder)
    batches = loader(folder, batch_size=10)
    flipped = 0
    for step, (x, y) in enumerate(batches.batches(0, 20)):
        for row, index in enumerate(batches.indices(step)):
            pixels = torch.from_numpy(images.load(index, random.Random(0)))
            flipped += torch.equal(x[row], pixels.flip(-1))
            assert torch.equal(x[row], pixels) or torch.equal(x[row], pixels.flip(-1))
            assert y[row] == images.labels[index]
    assert 70 <= flipped <= 130


def test_a_bad_file_stops_or_is_skipped_as_configured(folder: DataConfig, tmp_path: Path) -> None:
    for path in Path(folder.source).iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "a_0.png").write_bytes(b"torn")
    config = replace(folder, source=str(tmp_path))
    with pytest.raises(UserError, match=r"a_0\.png"):
        list(loader(config).batches(0, 3))
    skipping = replace(config, on_unreadable="skip")
    batches = list(loader(skipping).batches(0, 3))
    assert equal(batches, list(loader(skipping).batches(0, 3)))
    assert len(batches) == 3


def test_impossible_settings_are_named(folder: DataConfig) -> None:
    with pytest.raises(UserError, match="batch_size: got 0, expected 1 or more"):
        loader(folder, batch_size=0)
    with pytest.raises(UserError, match="workers: got 0, expected 1 or more"):
        loader(replace(folder, workers=0))
