"""The comparison of learning speeds at the smallest size: rows, tables, figure, and every mistake."""

import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import convergence
import judge
import learn
import learners
import learning_report
from learners import STUDIES, Variant
from mdt_fast.config import RunConfig
from mdt_fast.data.first_stage import FirstStage
from mdt_fast.training import passes
from replayed import Replayed
from rows import KEYS, RowFile, machine, read
from tiny import needs_csrc

FLAGS = ["--steps=2", "--points=2", "--seeds=2", "--samples=20", "--batch=4", "--jobs=1"]


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
    assert run(f"--out={out}") == 0  # all complete: nothing is trained again
    assert " 6 already complete" in capsys.readouterr().out
    assert (out / "rows.jsonl").read_text() == before
    assert run(f"--out={out}", "--study=path", "--jobs=2") == 0  # shares MDTv2 with the first study
    assert "4 learners, 2 already complete" in capsys.readouterr().out
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
    assert "\nscales\n" not in capsys.readouterr().out  # one scale tells nothing
    (made,) = out.glob("judge-*")
    made.rename(results / made.name)
    document = tmp_path / "text.md"
    marked = [f"<!-- {name}:begin -->\n<!-- {name}:end -->\n" for name in ("tokens", "scales")]
    document.write_text("".join(marked))
    assert run(f"--out={out}", "--study=updates,tokens", "--seeds=1", f"--readme={document}") == 0
    printed = capsys.readouterr().out
    assert "4 learners, 2 already complete" in printed  # with the same judge they are the same
    assert not list(out.glob("judge-*"))
    rows = read([out / "rows.jsonl"])
    assert {(row["study"], row["of"], row["shape"]["tokens"]) for row in rows} == {
        ("updates", 6, 16), ("tokens", 2, 64),
    }  # fmt: skip
    text = document.read_text()
    assert "| 16 | 6 | 1 |" in text
    assert "| 64 | 2 | 1 |" in text
    assert text.count("GFLOP an image") == 1  # it has no place for the other table


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


VARIANTS = {f"{study}, {one.name}": one for study, some in STUDIES.items() for one in some}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=needs_csrc if v.train.get("moments") else ()) for n, v in VARIANTS.items()]
)
def test_every_variant_learns(name: str, tiny: RunConfig, files: Path) -> None:
    """The loss is finite; parts in use move, parts left out stay."""
    variant = VARIANTS[name]
    if variant.train.get("float8_by") == "torchao":
        pytest.importorskip("torchao", reason="torchao is not installed")
    learner = learn.Learner(job(tiny, files, variant), torch.device("cpu"))
    before = {key: p.detach().clone() for key, p in learner.model.named_parameters()}
    data = judge.open_data(tiny.data, 20, torch.device("cpu"))
    batch = torch.rand(4, 1, 8, 8) * 2 - 1, torch.arange(4)
    for _ in range(4):  # the last layer opens first, then gates, then what is behind them
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
    """With one seed both draw the same, so their curves differ only by rounding."""
    fast, plain = (learn.learn(job(tiny, files, variant)) for variant in STUDIES["path"])
    for ours, theirs in zip(fast, plain, strict=True):
        assert ours.loss == pytest.approx(theirs.loss, rel=1e-4)
        assert ours.frechet == pytest.approx(theirs.frechet, rel=1e-2)
    assert fast[-1].flops < plain[-1].flops


@pytest.mark.parametrize(("name", "graphs"), [("models, DiT", 1), ("models, MDTv2", 4)])
def test_graphs_learn_the_same(
    name: str, graphs: int, tiny: RunConfig, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit; graphs for all numbers of kept tokens are captured before the clock starts."""
    ours, captured, clock = job(tiny, files, VARIANTS[name]), [], learn.Clock
    expected = [replace(point, seconds=0.0) for point in learn.learn(ours)]
    number = lambda: len(Replayed.made[0].captured)  # noqa: E731
    monkeypatch.setattr(passes, "Graphed", Replayed)
    monkeypatch.setattr(Replayed, "made", [])
    monkeypatch.setattr(learn, "passes_of", passes.GraphedPasses)
    monkeypatch.setattr(learn, "Clock", lambda device: captured.append(number()) or clock(device))
    assert [replace(point, seconds=0.0) for point in learn.learn(ours)] == expected
    assert captured == [graphs, graphs]


def test_a_learner_is_another_before_another_judge(tiny: RunConfig, files: Path, tmp_path: Path) -> None:
    """Distances in the features of different classifiers cannot be compared."""
    ours = job(tiny, files, STUDIES["path"][0])
    other = tmp_path / "judge.safetensors"
    other.write_bytes((files / "judge.safetensors").read_bytes())
    assert replace(ours, judge=other).digest == ours.digest  # wherever the file is
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
    """Variants whose masks do not matter yet start with the same loss: same images, times, noise."""
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


class Unclipped(FirstStage):
    clip = False


@pytest.mark.parametrize("clip", [True, False], ids=["pixels", "latents"])
def test_latents_are_not_clipped_nor_shown(clip: bool, tiny: RunConfig, files: Path, tmp_path: Path) -> None:
    ours = replace(job(tiny, files, STUDIES["path"][0]), folder=tmp_path)
    data = judge.open_data(tiny.data, 20, torch.device("cpu"))
    data = data if clip else replace(data, stage=Unclipped(1, 8))
    drawn, _ = learn.Learner(ours, torch.device("cpu")).pictures(data, 10)
    assert (drawn.abs().max() <= 1) == clip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(learn, "open_data", lambda *_: data)
        learn.learn(ours)
    assert ours.samples.exists() == clip


def test_a_learner_that_diverged_has_rows_and_is_called_so(
    tiny: RunConfig, files: Path, tmp_path: Path
) -> None:
    data = judge.open_data(tiny.data, 20, torch.device("cpu"))
    quality = judge.load_judge(files / "judge.safetensors", data, 10, 20, torch.device("cpu"))
    distance = quality.distance(torch.full((20, 1, 8, 8), math.nan))
    assert math.isinf(distance)
    rows = RowFile(tmp_path / "rows.jsonl", machine(torch.device("cpu"), "test"))
    point = learn.Point(step=1, seconds=1.0, flops=1.0, loss=0.5, frechet=8.0, accuracy=0.5)
    lost = replace(point, step=3, seconds=2.0, flops=2.0, loss=math.nan, frechet=distance)
    found = replace(lost, loss=0.1, frechet=4.0)
    for variant, points in zip(STUDIES["path"], ([point, found], [point, lost]), strict=True):
        convergence.add(rows, job(tiny, files, variant), points, quality)
    text = (tmp_path / "rows.jsonl").read_text()
    assert "NaN" not in text  # not valid JSON
    assert "Infinity" not in text
    made = read([tmp_path / "rows.jsonl"])
    assert math.isinf(learn.Point.of(made[-1]).frechet)
    assert math.isnan(learn.Point.of(made[-1]).loss)
    for turned in (made, made[2:] + made[:2]):
        learners = learning_report.studies(turned)["s"]
        table = learning_report.table("s", learners)
        assert "| diverged |" in table
        learning_report.draw("s", learners, {}, tmp_path / "s.png")


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
        (["--seeds=0"], "--seeds: got 0, expected 1 or more"),
        (["--samples=1000"], "--samples: got 1000 images to hold out, expected 2 to 539"),
        (["--size=imagenet"], "--data: --size imagenet needs images"),
        (["--data=/nowhere"], "no folder '/nowhere'"),
        (["--report"], "cannot read"),
        (["--lr=-1"], "--lr: got -1.0, expected 0 or more"),
        (["--lr=nan"], "--lr: got nan, expected 0 or more"),
        (["--readme=/nowhere.md"], "--readme: cannot read '/nowhere.md'"),
        (["--readme=/dev/null"], "lacks the markers <!-- models:begin -->"),
        (["--plot=/proc/nowhere/x.png"], "--plot: cannot make '/proc/nowhere'"),
        (["--plot=/proc/x.png"], "--plot: cannot write '/proc/x.png'"),
        (["--plot=x.pdf"], "--plot: got 'x.pdf', expected a file that ends in .png"),
        (["--plot=x.png", "--study=models,path"], "--plot: one figure for 2 studies"),
        (["--out=/proc/x"], "--out: cannot make '/proc/x'"),
    ],
)
def test_mistakes(flags: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        run(f"--out={tmp_path / 'out'}", *(["--device=cpu"] if "imagenet" in flags[0] else []), *flags) == 2
    )
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def fake(patch: pytest.MonkeyPatch, found: Callable[[learn.Job], float]) -> None:
    """Learners that train nothing; their distance after a step is ``found(job) / step``."""

    def learnt(jobs: Sequence[learn.Job], at_once: int) -> Iterator[tuple[learn.Job, list[learn.Point]]]:
        for job in jobs:
            np.savez(job.samples, samples=np.zeros((len(job.steps), 4, 1, 8, 8)), steps=job.steps)
            yield (
                job,
                [
                    learn.Point(
                        step=step, seconds=step, flops=step, loss=1.0, frechet=found(job) / step, accuracy=0.5
                    )
                    for step in job.steps
                ],
            )

    patch.setattr(convergence, "learnt", learnt)


def test_tables_are_of_what_was_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows with another learning rate in the same file are left alone, even later ones, and not mixed in."""
    fake(monkeypatch, lambda job: 1e6 * job.settings.train.lr)
    out = f"--out={tmp_path}"
    for lr, expected in (("0.001", "500"), ("0.002", "1,000"), ("0.001", "500")):
        assert run(out, "--study=path", f"--lr={lr}") == 0
        assert f"| {expected} | 50.0% |" in capsys.readouterr().out
    assert run(out, "--study=path", "--lr=0.003", "--seeds=1") == 0
    assert "one seed, so no band" in capsys.readouterr().out
    assert run(out, "--study=path", "--report") == 2
    assert "have different" in capsys.readouterr().err


def test_a_report_shows_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake(monkeypatch, lambda job: 8.0)
    drawn: list[set[str]] = []
    monkeypatch.setattr(
        learning_report, "draw", lambda _study, _learners, shown, _path: drawn.append(set(shown))
    )
    assert run(f"--out={tmp_path}", "--study=path") == 0
    assert run(f"--out={tmp_path}", "--study=path", "--report") == 0
    assert drawn == [{"MDTv2", "MDTv2, reference"}] * 2


def test_a_judge_that_cannot_judge(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake(monkeypatch, lambda job: 8.0)
    assert run(f"--out={tmp_path}", "--study=path") == 0
    (made,) = tmp_path.glob("judge-*")
    made.write_bytes(made.read_bytes()[:1000])
    assert run(f"--out={tmp_path}", "--study=path") == 2
    error = capsys.readouterr().err
    assert f"{made}: not a classifier of these images; delete the file to train it again" in error
    assert error.count("\n") == 1


def test_other_images_in_a_folder_have_another_judge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake(monkeypatch, lambda job: 8.0)
    for kind, shade in ("dark", 40), ("light", 200):
        (tmp_path / "images" / kind).mkdir(parents=True)
        for i in range(40):
            Image.new("RGB", (8, 8), (shade + i, shade, shade)).save(tmp_path / "images" / kind / f"{i}.png")
    flags = [f"--out={tmp_path}", "--study=path", f"--data={tmp_path / 'images'}"]
    assert run(*flags) == 0
    shutil.copytree(tmp_path / "images" / "dark", tmp_path / "images" / "more")
    assert run(*flags) == 0
    assert len(list(tmp_path.glob("judge-*"))) == 2


def test_rows_that_do_not_fit_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert run(f"--out={out}", "--study=path") == 0
    assert run(f"--out={out}", "--study=path", "--seeds=1", "--samples=30") == 0
    assert run(f"--out={out}", "--study=path", "--report") == 2
    assert "rows of the study 'path' have different" in capsys.readouterr().err
    whole = (out / "rows.jsonl").read_text().splitlines()
    other = [line.replace('"floor": ', '"floor": 1') if '"seed": 1' in line else line for line in whole[:8]]
    (out / "rows.jsonl").write_text("\n".join(other) + "\n")
    assert run(f"--out={out}", "--study=path", "--report") == 2
    assert "rows of the study 'path' have different" in capsys.readouterr().err
    (out / "rows.jsonl").write_text("\n".join(whole[:3]) + "\n")  # one learner, and part of another
    assert run(f"--out={out}", "--study=path", "--report") == 0
    assert "one seed, so no band" in capsys.readouterr().out


def test_damaged_samples_are_passed_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert learn.shown_samples(tmp_path, "0") is None
    assert capsys.readouterr().err == ""
    learn.samples_path(tmp_path, "0").write_bytes(b"PK\x03\x04 and no more")
    assert learn.shown_samples(tmp_path, "0") is None
    assert "samples-0.npz: cannot read samples" in capsys.readouterr().err
