"""``loss.png`` itself: elsewhere in the tests it is not rendered."""

import json
from pathlib import Path

import pytest
from PIL import Image

from mdt_fast.training import train
from mdt_fast.training.metrics import plot_losses
from tiny import tiny

pytestmark = pytest.mark.usefixtures("rendered")
SIZE = (840, 480)
ROWS = {
    "many": [{"step": step, "loss": 1 / step, "m_loss": 2 / step} for step in range(1, 60)],
    "one": [{"step": 3, "loss": 0.5, "m_loss": 0.6}],
    "no masked loss": [{"step": step, "loss": 0.1 * step} for step in (1, 2, 3)],
    "a loss that overflowed": [
        {"step": step, "loss": loss, "m_loss": loss}
        for step, loss in enumerate((0.5, float("nan"), float("inf"), 0.0, 0.4), 1)
    ],
}


def colors(picture: Path) -> int:
    with Image.open(picture) as image:
        assert image.size == SIZE
        return len(image.convert("RGB").getcolors(SIZE[0] * SIZE[1]))


@pytest.mark.parametrize("case", ROWS)
def test_rows_become_a_picture(case: str, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS[case]))
    plot_losses(tmp_path / "metrics.jsonl", tmp_path / "loss.png")
    assert colors(tmp_path / "loss.png") > 50


def test_nothing_to_plot(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    plot_losses(tmp_path / "metrics.jsonl", tmp_path / "loss.png")
    assert not (tmp_path / "loss.png").exists()


def test_a_run_has_one(tmp_path: Path) -> None:
    train(tiny(log_every=1), tmp_path / "run")
    assert colors(tmp_path / "run" / "loss.png") > 50
