"""Images out: exact bytes, the grid."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mdt_fast.errors import UserError
from mdt_fast.sampling import check_writable, grid, save_picture, save_pngs, to_uint8


def test_bytes_are_truncated_not_rounded() -> None:
    values = torch.tensor([-2.0, -1.0, -0.999, 0.0, 0.5, 0.9999, 1.0, 3.0]).reshape(1, 1, 2, 4)
    pixels = to_uint8(values.expand(1, 3, 2, 4))
    assert (pixels.shape, pixels.dtype) == ((1, 2, 4, 3), np.uint8)
    assert pixels[0, :, :, 0].ravel().tolist() == [0, 0, 0, 127, 191, 254, 255, 255]


@pytest.mark.parametrize(("side", "channels"), [(8, 1), (32, 3), (64, 3)])
def test_grid_has_a_row_per_class_enlarged_by_whole_pixels(side: int, channels: int) -> None:
    labels = [0, 2, 0, 2, 0]
    images = np.zeros((5, side, side, channels), np.uint8)
    images[1::2] = 200
    sheet = np.asarray(grid(images, labels, ["zero", "one", "two"]))
    assert set(np.unique(sheet[:, -20])) <= {0, 200, 255}, "no colour between two pixels"
    assert (sheet == 200).all(-1).any()
    columns = (sheet == 0).all(-1).any(0).sum()
    assert columns >= 3 * 56


def test_pngs_are_named_so_that_they_can_be_trained_on(tmp_path: Path) -> None:
    save_pngs(tmp_path / "new", np.full((2, 8, 8, 1), 9, np.uint8), [1, 0], ["a_b", "c/d"])
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["a-b_000001.png", "c-d_000000.png"]
    assert np.asarray(Image.open(tmp_path / "new" / "a-b_000001.png")).tolist() == [[9] * 8] * 8


def test_a_place_that_cannot_be_written_is_named_before_sampling(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is a folder"):
        check_writable(tmp_path)
    with pytest.raises(UserError, match="no folder"):
        check_writable(tmp_path / "none" / "x.png")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is a file; a folder is needed"):
        check_writable(tmp_path / "file" / "new", folder=True)
    check_writable(tmp_path / "none" / "new", folder=True)
    assert not (tmp_path / "none").exists()
    save_picture(tmp_path / "x.png", Image.new("L", (4, 4)))
    check_writable(tmp_path / "x.png")
