"""The comparison of learning speeds at the smallest size: its rows, tables, figure, and every mistake."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import convergence
import judge
import learn
import learners
from learners import STUDIES, Variant
from mdt_fast.config import RunConfig
from rows import KEYS, read

FLAGS = ["--steps=2", "--points=2", "--seeds=2", "--samples=20", "--batch=4"]


@pytest.fixture(scope="module")
def tiny() -> RunConfig:
    size = learners.SIZES["cpu"]
    return replace(
        size,
        model=replace(size.model, input_size=8, patch_size=2, hidden_size=16, depth=4, num_heads=2),
        data=replace(size.data, image_size=8),
        sample=replace(size.sample, steps=2, sampler="ddim"),
    )


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch, tiny: RunConfig) -> None:
    monkeypatch.setitem(learners.SIZES, "cpu", tiny)
    updates = judge.train_classifier.__defaults__
    assert updates == (judge.UPDATES,)
    monkeypatch.setattr(judge.train_classifier, "__defaults__", (10,))


def run(*flags: str) -> int:
    return convergence.main([*FLAGS, *flags])


def test_a_comparison_leaves_rows_tables_and_a_figure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    document = tmp_path / "text.md"
    document.write_text("before\n<!-- models:begin -->\nstale\n<!-- models:end -->\nafter\n")
    assert run(f"--out={out}", f"--readme={document}") == 0
    printed = capsys.readouterr().out
    rows = read([out / "rows.jsonl"])
    assert len(rows) == 3 * 2 * 2
    assert all({*KEYS, "study", "seed", "step", "flops", "floor", "digest"} <= set(row) for row in rows)
    first = {(row["provider"], row["seed"]): row for row in rows if row["step"] == 1}
    assert first["MDTv2", 0]["flops"] > first["DiT", 0]["flops"] > 0
    assert all(row["p50"] > 0 and 0 <= row["accuracy"] <= 1 for row in rows)
    text = document.read_text()
    assert "stale" not in text
    for variant in STUDIES["models"]:
        assert f"| {variant.name} |" in printed
        assert f"| {variant.name} |" in text
    assert (out / "models.png").stat().st_size > 10_000

    before = (out / "rows.jsonl").read_text()
    assert run(f"--out={out}") == 0  # all is complete: nothing is trained again
    assert "of which 6 are complete" in capsys.readouterr().out
    assert (out / "rows.jsonl").read_text() == before
    assert run(f"--out={out}", "--study=path") == 0  # MDTv2 is known from before, by another study
    assert "4 learners, of which 2 are complete" in capsys.readouterr().out
    assert run(f"--out={out}", "--report") == 0
    assert "sooner than DiT" in capsys.readouterr().out
    assert run(f"--out={out}", "--report", "--study=parts") == 2
    assert "has no rows of parts" in capsys.readouterr().err


def test_scales_and_a_judge_that_came_with_results(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, results = tmp_path / "out", tmp_path / "results"
    results.mkdir()
    monkeypatch.setattr(convergence, "RESULTS", results)
    assert run(f"--out={out}", "--study=updates", "--seeds=1") == 0
    assert "\nscales\n" not in capsys.readouterr().out  # one scale says nothing
    (made,) = out.glob("judge-*")
    made.rename(results / made.name)
    document = tmp_path / "text.md"
    markers = "".join(
        f"<!-- {name}:begin -->\n<!-- {name}:end -->\n" for name in ("updates", "tokens", "scales")
    )
    document.write_text(markers)
    assert run(f"--out={out}", "--study=updates,tokens", "--seeds=1", f"--readme={document}") == 0
    printed = capsys.readouterr().out
    assert "4 learners, of which 2 are complete" in printed  # before the same judge they are the same
    assert not list(out.glob("judge-*"))
    rows = read([out / "rows.jsonl"])
    assert {(row["study"], row["of"], row["shape"]["tokens"]) for row in rows} == {
        ("updates", 6, 16), ("tokens", 2, 64),
    }  # fmt: skip
    assert "| 16 | 6.00 | 1 |" in document.read_text()
    assert "| 64 | 2.00 | 1 |" in document.read_text()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, tiny: RunConfig) -> Path:
    """A folder with a judge."""
    folder = tmp_path_factory.mktemp("judge")
    data = judge.open_data(tiny.data, 20, torch.device("cpu"))
    classifier = judge.train_classifier(data, 10, torch.device("cpu"), updates=10)
    judge.save_classifier(folder / "judge.safetensors", classifier)
    return folder


def job(tiny: RunConfig, files: Path, variant: Variant, **changes: Any) -> learn.Job:
    settings = variant.settings(tiny)
    settings = replace(settings, train=replace(settings.train, steps=3, batch_size=4))
    return learn.Job(
        study="s", variant=variant, settings=settings, seed=0, steps=(1, 3), folder=files,
        judge=files / "judge.safetensors", classes=10, threads=torch.get_num_threads(), **changes,
    )  # fmt: skip


VARIANTS = {
    f"{study}, {variant.name}": variant
    for study, variants in STUDIES.items()
    for variant in variants
    if not variant.train.get("float8")
}


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_learns(name: str, tiny: RunConfig, files: Path) -> None:
    """The loss is finite, what takes part moves, what is left out stays."""
    variant = VARIANTS[name]
    learner = learn.Learner(job(tiny, files, variant), torch.device("cpu"))
    before = {key: p.detach().clone() for key, p in learner.model.named_parameters()}
    data = judge.open_data(tiny.data, 20, torch.device("cpu"))
    batch = torch.rand(4, 1, 8, 8) * 2 - 1, torch.arange(4)
    for _ in range(4):  # the last layer opens in the first, then gates, then what is behind them
        assert learner.step(data, batch).isfinite()
    if variant.passes == "masked":
        assert learner.flops() > 0
    moved = {key for key, p in learner.model.named_parameters() if not p.equal(before[key])}
    assert "x_embedder.proj.weight" in moved
    tables = [key for key in before if key.endswith("relative_position_bias_table")]
    sides = [key for key in before if key.startswith("sideblocks")]
    assert any(key in moved for key in tables) == (variant.family != "dit" and "bias" not in variant.without)
    in_use = (
        variant.family != "dit" and variant.passes in ("both", "masked") and "side" not in variant.without
    )
    assert any(key in moved for key in sides) == in_use


def test_the_fast_path_learns_as_the_reference_does(tiny: RunConfig, files: Path) -> None:
    """From one seed the two draw the same, so their curves differ by rounding alone."""
    fast, plain = (learn.learn(job(tiny, files, variant)) for variant in STUDIES["path"])
    for ours, theirs in zip(fast, plain, strict=True):
        assert ours.loss == pytest.approx(theirs.loss, rel=1e-4)
        assert ours.frechet == pytest.approx(theirs.frechet, rel=1e-2)
    assert fast[-1].flops < plain[-1].flops


def test_a_learner_is_another_before_another_judge(tiny: RunConfig, files: Path, tmp_path: Path) -> None:
    """Distances in the features of different classifiers are not to be compared."""
    ours = job(tiny, files, STUDIES["path"][0])
    other = tmp_path / "judge.safetensors"
    other.write_bytes((files / "judge.safetensors").read_bytes())
    assert replace(ours, judge=other).digest == ours.digest  # wherever it lies
    other.write_bytes(other.read_bytes()[:-1] + b"\1")
    assert replace(ours, judge=other).digest != ours.digest


def test_a_learner_stays_itself_when_settings_are_added() -> None:
    defaults = {"train": {"steps": 1, "new": False}, "seed": 0}
    assert learn.changed({"train": {"steps": 2, "new": False}, "seed": 0}, defaults) == {
        "train": {"steps": 2}
    }
    assert learn.changed({"train": {"steps": 1, "new": True}, "seed": 0}, defaults) == {
        "train": {"new": True}
    }
    assert learn.changed(defaults, defaults) == {}


def test_seeds_and_variants_share_their_images(tiny: RunConfig, files: Path) -> None:
    """The first losses of variants whose masks do not matter yet are the same: same images, times, noise."""
    first = [learn.learn(job(tiny, files, variant))[0].loss for variant in STUDIES["models"]]
    assert first[0] == pytest.approx(first[1], rel=1e-5)
    assert first[0] == pytest.approx(first[2], rel=1e-5)


def test_images_kept_apart_are_not_learnt_from(tiny: RunConfig) -> None:
    data = judge.open_data(tiny.data, 100, torch.device("cpu"))
    assert len(data.apart.labels) == 100
    assert not set(data.apart.indices) & set(data.learnt.indices)
    assert len(data.learnt.labels) + 100 == 1797
    larger = judge.open_data(replace(tiny.data, image_size=16), 100, torch.device("cpu"))
    pixels, labels = larger.tensors(larger.apart, 5, torch.device("cpu"))
    assert pixels.shape == (5, 1, 16, 16)
    assert pixels.abs().max() <= 1
    assert labels.tolist() == data.apart.labels[:5].tolist()


def test_judged_at_the_end_and_before() -> None:
    assert learn.judged_at(600, 9)[0] == 37
    assert learn.judged_at(600, 9)[-1] == 600
    assert len(learn.judged_at(600, 9)) == 9
    assert learn.judged_at(1, 9) == (1,)
    assert learn.judged_at(5, 1) == (5,)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--study=model"], "--study: got 'model'"),
        (["--seeds=0"], "--seeds: got 0, allowed is 1 or more"),
        (["--samples=1000"], "--samples: 1000 images are to be kept apart, allowed are 2 to 539"),
        (["--size=imagenet"], "--data: --size imagenet needs images"),
        (["--data=/nowhere"], "no folder '/nowhere'"),
        (["--report"], "cannot read"),
    ],
)
def test_mistakes(flags: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        run(f"--out={tmp_path / 'out'}", *(["--device=cpu"] if "imagenet" in flags[0] else []), *flags) == 2
    )
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_rows_that_do_not_fit_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert run(f"--out={out}", "--study=path") == 0
    assert run(f"--out={out}", "--study=path", "--seeds=1", "--samples=30") == 2
    assert "rows of the study 'path' have different" in capsys.readouterr().err
    whole = (out / "rows.jsonl").read_text().splitlines()
    other = [line.replace('"floor": ', '"floor": 1') if '"seed": 1' in line else line for line in whole[:8]]
    (out / "rows.jsonl").write_text("\n".join(other) + "\n")
    assert run(f"--out={out}", "--study=path", "--report") == 2
    assert "rows of the study 'path' have different" in capsys.readouterr().err
    (out / "rows.jsonl").write_text("\n".join(whole[:3]) + "\n")  # one learner, and a part of another
    assert run(f"--out={out}", "--study=path", "--report") == 0
    assert "one seed, so no band" in capsys.readouterr().out
