"""The evaluator's sample file: its layout, written batch by batch, in little memory."""

import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from mdt_fast.errors import UserError
from mdt_fast.sampling import adm_name, save_npz

IMAGES = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), dtype=np.uint8)
LABELS = [3, 1, 4, 1, 5]


@pytest.mark.parametrize("batches", [None, [5], [2, 3], [1, 0, 4]], ids=["array", "5", "2+3", "1+0+4"])
def test_npz_has_the_evaluators_layout(batches: list[int] | None, tmp_path: Path) -> None:
    images = IMAGES if batches is None else iter(np.split(IMAGES, np.cumsum(batches)[:-1]))
    save_npz(tmp_path / "samples.npz", images, LABELS)
    with np.load(tmp_path / "samples.npz", allow_pickle=False) as saved:
        assert saved.files == ["arr_0", "arr_1"]
        np.testing.assert_array_equal(saved["arr_0"], IMAGES)
        assert (saved["arr_0"].dtype, saved["arr_1"].dtype) == (np.uint8, np.int64)
        assert saved["arr_1"].tolist() == LABELS
    assert [path.name for path in tmp_path.iterdir()] == ["samples.npz"]


def test_views_are_written_in_their_order(tmp_path: Path) -> None:
    save_npz(tmp_path / "samples.npz", IMAGES[::-1, :, ::-1], LABELS)
    with np.load(tmp_path / "samples.npz") as saved:
        np.testing.assert_array_equal(saved["arr_0"], IMAGES[::-1, :, ::-1])


def test_batches_are_never_in_memory_together(tmp_path: Path) -> None:
    def batches() -> Iterator[np.ndarray]:
        for value in range(64):
            yield np.full((8, 64, 64, 3), value, np.uint8)  # 96 KiB, 6 MiB in all

    tracemalloc.start()
    save_npz(tmp_path / "samples.npz", batches(), [0] * 512)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20
    with np.load(tmp_path / "samples.npz") as saved:
        assert saved["arr_0"].reshape(64, -1).std(1).max() == 0


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (IMAGES, ["x"] * 5, "'x'"),
        (IMAGES, LABELS[:3], "3 labels need as many images, got 5"),
        ([], LABELS, "5 labels need as many images, got 0"),
        (IMAGES.astype(np.float32), LABELS, r"got float32 .*, expected uint8 \[N, H, W, C\]"),
        ([IMAGES[:2], IMAGES[2:, :4]], LABELS, r"\[4, 8, 3\] comes after \[8, 8, 3\]"),
    ],
    ids=["labels", "too-many", "none", "dtype", "size"],
)
def test_a_failed_write_leaves_the_old_file(images, labels: list, message: str, tmp_path: Path) -> None:
    path = tmp_path / "samples.npz"
    save_npz(path, np.zeros((1, 8, 8, 1), np.uint8), [0])
    before = path.read_bytes()
    with pytest.raises((UserError, ValueError), match=message):
        save_npz(path, images, labels)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["samples.npz"]


def test_the_usual_name() -> None:
    assert adm_name(50_000, 256, 256) == "samples_50000x256x256x3.npz"


def test_a_path_can_be_a_string(tmp_path: Path) -> None:
    save_npz(str(tmp_path / "samples.npz"), IMAGES, LABELS)
    with np.load(tmp_path / "samples.npz") as saved:
        assert saved["arr_1"].tolist() == LABELS
