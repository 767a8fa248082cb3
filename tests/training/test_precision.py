"""Half types in a run: float16 with its loss scale, bfloat16; compiled by block, with pictures between."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from mdt_fast.errors import UserError
from mdt_fast.models.base import Transformer
from mdt_fast.models.blocks import Block
from mdt_fast.models.zoo import build_model
from mdt_fast.training import passes, train
from mdt_fast.training import run as run_module
from mdt_fast.training.checkpoint import open_checkpoint
from mdt_fast.training.metrics import Metrics, read_rows
from mdt_fast.training.parallelize import parallelize
from mdt_fast.training.run import Run
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


LEAN = {"dtype": "bfloat16", "weights": "bfloat16", "moments": "bfloat16"}


@pytest.mark.parametrize("optimizer", ["adan", "adamw"])
def test_bfloat16_weights_follow_float32(optimizer: str, tmp_path: Path) -> None:
    """What is saved is float32 but for the moments, and twice less of it; halves of the run equal the whole,
    bit for bit, moments that are rounded at random included."""
    settings = {"log_every": 1, "lr": 1e-2, "warmup_steps": 0, "optimizer": optimizer}
    config = tiny(**settings, **LEAN)
    train(tiny(**settings), tmp_path / "float32")
    train(config, tmp_path / "whole")
    rows = [read_rows(tmp_path / name / "metrics.jsonl") for name in ("float32", "whole")]
    for expected, row in zip(*rows, strict=True):
        for key in ("loss", "m_loss", "grad_norm"):
            assert row[key] == pytest.approx(expected[key], rel=3e-2)
    opened = open_checkpoint(tmp_path / "whole")
    for part in ("model", "ema"):
        weights = opened.tensors(part)
        assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
        assert not torch.equal(weights["pos_embed"], weights["pos_embed"].bfloat16().float())
    moments = {name.rpartition("/")[2]: t.dtype for name, t in opened.tensors("optimizer").items()}
    assert moments.pop("skipped_steps") == torch.int64
    assert moments.pop("step", torch.float32) == torch.float32
    assert set(moments.values()) == {torch.bfloat16}
    assert "master" not in moments
    train(replace(config, train=replace(config.train, steps=4)), tmp_path / "halves")
    train(config, tmp_path / "halves", resume="auto")
    step = Path("checkpoints", "step_0000008")
    assert tensors_of(tmp_path / "halves" / step) == tensors_of(tmp_path / "whole" / step)


@pytest.mark.parametrize(
    "more", [{}, {"passes": "in_turn"}, {"accumulate": 2}, {"checkpointing": "full"}], ids=str
)
def test_the_network_has_what_the_optimiser_has_rounded(
    more: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After every step, with a picture of the average between; and the blocks pass bfloat16 on."""
    runs: list[Run] = []
    passed: set[torch.dtype] = set()
    save = Run.save

    def looked_at(run: Run, metrics: Metrics) -> None:
        runs.append(run)
        for name, p in run.model.named_parameters():
            assert p.dtype == torch.bfloat16
            assert torch.equal(p, run.masters[name].bfloat16())
        save(run, metrics)

    def saw(block: Block, args: tuple[Tensor, ...], out: Tensor) -> None:
        if block.training:
            passed.update((args[0].dtype, out.dtype))

    monkeypatch.setattr(Run, "save", looked_at)
    monkeypatch.setattr(run_module, "parallelize", lambda model, *_: hooked(model, saw))
    train(tiny(**LEAN, **more, steps=4, save_every=2), tmp_path / "run")
    assert len(runs) == 2
    assert len(list((tmp_path / "run" / "samples").iterdir())) >= 1
    assert passed == {torch.bfloat16}


def hooked(model: Transformer, hook: Any) -> bool:
    for block in model.every_block():
        block.register_forward_hook(hook)
    return False


def test_what_bfloat16_weights_do_not_go_with(tmp_path: Path) -> None:
    for dtype in ("float32", "float16"):
        with pytest.raises(
            UserError, match=f"train.weights: bfloat16 goes with train.dtype bfloat16, got {dtype}"
        ):
            train(tiny(dtype=dtype, weights="bfloat16"), tmp_path / "out")
    two, cpu = SimpleNamespace(size=2), torch.device("cpu")
    model = build_model(tiny().model)
    with pytest.raises(
        UserError, match=r"train.weights: 'bfloat16' is for one process; several keep shards in"
    ):
        parallelize(model, tiny(**LEAN).train, two, cpu)  # type: ignore[arg-type]
    train(tiny(steps=1), tmp_path / "out")
    for name in ("weights", "moments"):
        with pytest.raises(
            UserError, match=rf"train.{name}: cannot change when a run goes on; it has 'float32'"
        ):
            train(tiny(dtype="float32", **{name: "bfloat16"}), tmp_path / "out", resume="auto")


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
