"""Steps whose losses are not finite: what is counted, and which checkpoints stay."""

from pathlib import Path

import torch

from mdt_fast.training import checkpoint
from mdt_fast.training.distributed import World
from mdt_fast.training.metrics import Metrics
from mdt_fast.training.saving import Saver


def test_one_from_before_bad_steps_is_kept_as_long_as_they_last(tmp_path: Path) -> None:
    """It alone can be resumed from, if they go on; others go as always."""
    saver = Saver(tmp_path, World(), keep=1, asynchronous=False)
    parts = {"model": {"weight": torch.ones(2)}}
    left = []
    for step, bad in ((2, 0), (4, 0), (6, 1), (8, 3), (10, 5), (12, 0)):
        saver.save(step, parts, {}, bad)
        left.append([checkpoint.number_of(path) for path in checkpoint.steps(tmp_path)])
    saver.close()
    assert left == [[2], [4], [4, 6], [4, 8], [4, 10], [12]]


def test_bad_steps_after_the_last_row_count(tmp_path: Path) -> None:
    """A run that is stopped between two rows saves them with the checkpoint."""
    metrics = Metrics(tmp_path / "metrics.jsonl", step=0, num_timesteps=10, batch_size=1)
    for step, loss in enumerate((1.0, torch.nan, 1.0, torch.inf, torch.nan), start=1):
        metrics.add({"loss": torch.tensor([loss])}, torch.tensor([3]), torch.tensor(1.0))
        metrics.pending(step)
    assert metrics.bad == 2
    metrics.row(5, 1e-3)
    metrics.pending(5)
    assert (metrics.bad, metrics.streak) == (2, 2)
