"""The model of a run, in Python."""

from pathlib import Path

import pytest
import torch

from mdt_fast import DiffusionConfig, UserError, load_run, sample
from mdt_fast.training import train
from mdt_fast.training.checkpoint import open_checkpoint
from tiny import tiny


def test_the_model_of_a_run(tmp_path: Path) -> None:
    config = tiny(steps=4, save_every=2, lr=0.01, tensorboard=False)
    train(config, tmp_path)
    for weights in ("ema", "model"):
        model = load_run(str(tmp_path), weights)
        assert not model.training
        assert model.config == config.model
        saved = open_checkpoint(tmp_path).tensors(weights)
        assert {name for name, _ in model.named_parameters()} == saved.keys()
        assert all(torch.equal(p, saved[name]) for name, p in model.named_parameters())
        indices = {id(b.attn.rel_pos_bias.relative_position_index) for b in model.every_block()}
        assert len(indices) == 1
    assert sample(model, DiffusionConfig(), [1, 2], config.sample).isfinite().all()
    model.train().requires_grad_(True)
    before = load_run(tmp_path / "checkpoints" / "step_0000002")
    assert not torch.equal(before.pos_embed, load_run(tmp_path).pos_embed)
    assert [p.requires_grad for p in before.parameters()] == [True] * len(list(before.parameters()))
    with torch.no_grad():
        before.pos_embed.zero_()  # must not reach the file
    assert load_run(tmp_path / "checkpoints" / "step_0000002").pos_embed.any()


def test_what_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run or checkpoint at"):
        load_run(tmp_path / "nothing")
    with pytest.raises(UserError, match="weights: got 'best', expected ema or model"):
        load_run(tmp_path, "best")
