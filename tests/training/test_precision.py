"""Half types in a run: float16 with its loss scale, bfloat16; compiled by block, with pictures between."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from mdt_fast.cli import main
from mdt_fast.errors import UserError
from mdt_fast.kernels.native import MISSING
from mdt_fast.models.base import Transformer
from mdt_fast.models.blocks import Block
from mdt_fast.models.float8 import use_float8
from mdt_fast.models.zoo import build_model
from mdt_fast.training import passes, train
from mdt_fast.training import run as run_module
from mdt_fast.training.checkpoint import open_checkpoint
from mdt_fast.training.metrics import Metrics, read_rows
from mdt_fast.training.parallelize import parallelize
from mdt_fast.training.run import Run
from tiny import LEAN, needs_csrc, tensors_of, tiny


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


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mdt_fast.training.parallelize.use_float8", partial(use_float8, emulate=True))


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize(
    "form", [{}, {"checkpointing": "full"}, {"accumulate": 2}, {"passes": "in_turn"}], ids=str
)
def test_float8_follows_float32(form: dict[str, Any], tmp_path: Path) -> None:
    """Weights are saved in float32; a run in two halves equals the whole, bit for bit."""
    settings = {"log_every": 1, "lr": 1e-2, "warmup_steps": 0, **form}
    config = tiny(**settings, dtype="bfloat16", float8=True)
    train(tiny(**settings), tmp_path / "float32")
    train(config, tmp_path / "whole")
    rows = [read_rows(tmp_path / name / "metrics.jsonl") for name in ("float32", "whole")]
    assert rows[0] != rows[1]
    for expected, row in zip(*rows, strict=True):
        for key in ("loss", "m_loss", "grad_norm"):
            assert row[key] == pytest.approx(expected[key], rel=4e-2)
    weights = open_checkpoint(tmp_path / "whole").tensors("model")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    train(replace(config, train=replace(config.train, steps=4)), tmp_path / "halves")
    train(config, tmp_path / "halves", resume="auto")
    ends = [tensors_of(open_checkpoint(tmp_path / name).path) for name in ("whole", "halves")]
    assert ends[0] == ends[1]


@pytest.mark.usefixtures("emulated")
def test_runs_of_before_are_torchaos(tmp_path: Path) -> None:
    """Before ``float8_by`` existed, ``train.float8`` meant torchao's."""
    train(tiny(dtype="bfloat16", float8=True, steps=4), tmp_path / "run")
    opened = open_checkpoint(tmp_path / "run")
    assert opened.config.train.float8_by == "kernels"
    del opened.state["config"]["train"]["float8_by"]
    assert opened.config.train.float8_by == "torchao"
    opened.state["config"]["train"]["float8"] = False
    assert opened.config.train.float8_by == "kernels"


def test_what_float8_does_not_go_with(tmp_path: Path) -> None:
    for settings, said in (
        ({"dtype": "float16", "float8": True}, "train.float8: needs train.dtype bfloat16, got float16"),
        (
            {"float8": True, "float8_by": "apex"},
            "train.float8_by: got 'apex', expected 'kernels', 'torchao'",
        ),
        ({"float8_by": "torchao"}, "train.float8_by: torchao needs train.float8=true"),
        (
            {"dtype": "bfloat16", "float8": True},
            "float8: needs a GPU of compute capability 8.9, 9.0, 10.0, 10.3",
        ),
    ):
        with pytest.raises(UserError, match=said):
            train(tiny(**settings), tmp_path / "out")


@needs_csrc
@pytest.mark.parametrize("optimizer", ["adan", "adamw"])
def test_bfloat16_weights_follow_float32(optimizer: str, tmp_path: Path) -> None:
    """All but the moments is saved in float32; a run in two halves equals the whole, bit for bit, even with
    moments that are rounded at random."""
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


@needs_csrc
@pytest.mark.parametrize(
    "more", [{}, {"passes": "in_turn"}, {"accumulate": 2}, {"checkpointing": "full"}], ids=str
)
def test_the_network_has_what_the_optimiser_has_rounded(
    more: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At each checkpoint, with a picture of the average in between; and the blocks pass bfloat16 on."""
    runs: list[Run] = []
    passed: set[torch.dtype] = set()
    save = Run.save

    def looked_at(run: Run, metrics: Metrics) -> None:
        runs.append(run)
        for name, p in run.model.named_parameters():
            assert p.dtype == torch.bfloat16
            assert torch.equal(p, run.masters[name].bfloat16())
            assert p.grad is None or p.grad.dtype == (
                torch.float32 if "accumulate" in more else torch.bfloat16
            )
        save(run, metrics)

    def saw(block: Block, args: tuple[Tensor, ...], out: Tensor) -> None:
        if block.training:
            passed.update((args[0].dtype, out.dtype))

    monkeypatch.setattr(Run, "save", looked_at)

    def hooked(model: Transformer, *args: Any) -> bool:
        for block in model.every_block():
            block.register_forward_hook(saw)
        return parallelize(model, *args)

    monkeypatch.setattr(run_module, "parallelize", hooked)
    train(tiny(**LEAN, **more, steps=4, save_every=2), tmp_path / "run")
    assert len(runs) == 2
    assert len(list((tmp_path / "run" / "samples").iterdir())) >= 1
    assert passed == {torch.bfloat16}


@needs_csrc
def test_a_step_left_out_leaves_the_weights_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The losses of the second and fifth step are NaN; a run halved at the third equals the whole."""
    losses = passes.losses_of

    def broken(model: Any, diffusion: Any, x: Tensor, y: Tensor, draws: Any) -> dict[str, Tensor]:
        bad = float(draws.noise[0, 0, 0, 0]) in worst
        return {
            name: values * float("nan") if bad else values
            for name, values in losses(model, diffusion, x, y, draws).items()
        }

    seen: list[float] = []
    monkeypatch.setattr(
        passes, "losses_of", lambda *args: seen.append(float(args[4].noise[0, 0, 0, 0])) or losses(*args)
    )
    config = tiny(**LEAN, steps=6, save_every=3, log_every=1)
    train(config, tmp_path / "seen")
    worst = {seen[1], seen[4]}
    monkeypatch.setattr(passes, "losses_of", broken)
    train(config, tmp_path / "whole")
    assert read_rows(tmp_path / "whole" / "metrics.jsonl")[-1]["skipped"] == 2
    train(replace(config, train=replace(config.train, steps=3)), tmp_path / "halves")
    train(config, tmp_path / "halves", resume="auto")
    step = Path("checkpoints", "step_0000006")
    assert tensors_of(tmp_path / "halves" / step) == tensors_of(tmp_path / "whole" / step)
    assert tensors_of(tmp_path / "seen" / step) != tensors_of(tmp_path / "whole" / step)


@needs_csrc
def test_a_run_may_go_on_with_other_weights_and_moments(tmp_path: Path) -> None:
    """A checkpoint's weights are always float32; its moments have the dtype that its run asked for."""
    forms: list[dict[str, Any]] = [{}, {"weights": "bfloat16"}, {"moments": "bfloat16"}, {}]
    for number, form in enumerate(forms, 1):
        config = tiny(dtype="bfloat16", log_every=1, save_every=2, steps=2 * number, **form)
        train(config, tmp_path / "run", resume="auto" if number > 1 else None)
        opened = open_checkpoint(tmp_path / "run")
        assert opened.step == 2 * number
        assert {t.dtype for t in opened.tensors("model").values()} == {torch.float32}
        moments = {t.dtype for name, t in opened.tensors("optimizer").items() if name.endswith("exp_avg")}
        assert moments == {torch.bfloat16 if form.get("moments") else torch.float32}
    train(tiny(dtype="bfloat16", log_every=1, steps=8), tmp_path / "whole")
    rows = [read_rows(tmp_path / name / "metrics.jsonl") for name in ("whole", "run")]
    for expected, row in zip(*rows, strict=True):
        assert row["loss"] == pytest.approx(expected["loss"], rel=1e-2)


@needs_csrc
def test_what_bfloat16_weights_do_not_go_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for dtype in ("float32", "float16"):
        with pytest.raises(
            UserError, match=f"train.weights: bfloat16 needs train.dtype bfloat16, got {dtype}"
        ):
            train(tiny(dtype=dtype, weights="bfloat16"), tmp_path / "out")
    monkeypatch.setitem(MISSING, "cpu", "not built")
    with pytest.raises(
        UserError, match=r"train.moments: 'bfloat16' needs the op of csrc .* on cpu it is not b"
    ):
        train(tiny(moments="bfloat16"), tmp_path / "out")
    monkeypatch.undo()
    two, cpu = SimpleNamespace(size=2), torch.device("cpu")
    model = build_model(tiny().model)
    with pytest.raises(
        UserError, match=r"train.weights: 'bfloat16' needs one process, or train.parallel ddp"
    ):
        parallelize(model, tiny(**LEAN).train, two, cpu)  # type: ignore[arg-type]


def test_float16_steps_that_overflow_are_skipped_and_the_scale_falls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss is thirty times too large for the first scale; a run in two halves equals the whole."""
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


def test_weights_begin_a_float16_run(tmp_path: Path) -> None:
    """What convert makes has no loss scale yet: it begins as in a new run."""
    train(tiny(steps=1), tmp_path / "old")
    weights, new = str(tmp_path / "w.safetensors"), str(tmp_path / "new")
    assert main(["convert", str(tmp_path / "old"), weights]) == 0
    settings = ["--set=train.dtype=float16", "--set=train.steps=2", "--set=train.batch_size=4"]
    assert main(["convert", weights, new, "--data=digits", "--set=sample.steps=2", *settings]) == 0
    assert main(["train", f"--out={new}", "--resume=auto"]) == 0
    saved = open_checkpoint(tmp_path / "new").tensors("optimizer", "counters/")
    assert saved["counters/loss_scale"].tolist() == [2.0**16, 2.0]


@pytest.mark.slow
def test_compiled_by_block_with_pictures_between(tmp_path: Path) -> None:
    """Pictures have other shapes and no gradients: they must not use up the limit of recompilations."""
    torch._dynamo.reset()
    settings = {"steps": 6, "save_every": 2, "log_every": 1, "lr": 1e-2}
    train(tiny(**settings), tmp_path / "eager")
    train(tiny(**settings, compile="block", checkpointing="selective"), tmp_path / "compiled")
    assert len(list((tmp_path / "compiled" / "samples").iterdir())) >= 1
    rows = [read_rows(tmp_path / name / "metrics.jsonl") for name in ("eager", "compiled")]
    for expected, row in zip(*rows, strict=True):
        assert row["loss"] == pytest.approx(expected["loss"], rel=1e-4)
        assert row["m_loss"] == pytest.approx(expected["m_loss"], rel=1e-4)
