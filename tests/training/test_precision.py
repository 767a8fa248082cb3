"""Half types in a run: float16 with its loss scale, bfloat16; compiled by block, with pictures between."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mdt_fast.training import passes, train
from mdt_fast.training.checkpoint import open_checkpoint
from mdt_fast.training.metrics import read_rows
from tiny import tensors_of, tiny


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_types_follow_float32(dtype: str, tmp_path: Path) -> None:
    for name in ("float32", dtype):
        train(tiny(dtype=name, log_every=1, lr=1e-2, warmup_steps=0), tmp_path / name)
    rows = [read_rows(tmp_path / name / "metrics.jsonl") for name in ("float32", dtype)]
    for expected, row in zip(*rows, strict=True):
        for key in ("loss", "m_loss", "grad_norm"):
            assert row[key] == pytest.approx(expected[key], rel=3e-2)
    weights = open_checkpoint(tmp_path / dtype).tensors("model")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}


def test_float16_steps_that_overflow_are_skipped_and_the_scale_falls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss is thirty times too large, so the first scale is too; halves of the run equal the whole."""
    losses = passes.losses_of

    def steep(*args):
        return {name: values * 30 for name, values in losses(*args).items()}

    monkeypatch.setattr(passes, "losses_of", steep)
    config = tiny(dtype="float16", log_every=1, steps=8, save_every=4, lr=1e-2)
    train(config, tmp_path / "whole")
    rows = read_rows(tmp_path / "whole" / "metrics.jsonl")
    skipped = rows[-1]["skipped"]
    assert 1 <= skipped < 8
    saved = open_checkpoint(tmp_path / "whole").tensors("optimizer", "counters/")
    assert saved["counters/skipped_steps"] == skipped
    assert saved["counters/loss_scale"][0] == 2.0 ** (16 - skipped)
    train(replace(config, train=replace(config.train, steps=4)), tmp_path / "halves")
    train(config, tmp_path / "halves", resume="auto")
    step = Path("checkpoints", "step_0000008")
    assert tensors_of(tmp_path / "halves" / step) == tensors_of(tmp_path / "whole" / step)


@pytest.mark.slow
def test_compiled_by_block_with_pictures_between(tmp_path: Path) -> None:
    """Pictures are of other shapes, and without gradients: they must not use up what may be compiled."""
    torch._dynamo.reset()
    settings = {"steps": 6, "save_every": 2, "log_every": 1, "lr": 1e-2}
    train(tiny(**settings), tmp_path / "eager")
    train(tiny(**settings, compile="block", checkpointing="selective"), tmp_path / "compiled")
    assert len(list((tmp_path / "compiled" / "samples").iterdir())) >= 1
    rows = [read_rows(tmp_path / name / "metrics.jsonl") for name in ("eager", "compiled")]
    for expected, row in zip(*rows, strict=True):
        assert row["loss"] == pytest.approx(expected["loss"], rel=1e-4)
        assert row["m_loss"] == pytest.approx(expected["m_loss"], rel=1e-4)
