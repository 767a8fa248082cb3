"""What surrounds a training step, measured at the smallest size: every part's rows, and every mistake."""

from pathlib import Path

import pytest

import feed
import looping
import report
import training
from rows import KEYS, read
from tiny import tiny


@pytest.fixture
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("BATCH", 4), ("SHARD", 4), ("LATENT_BATCHES", 2)):
        monkeypatch.setattr(feed, name, value)
    monkeypatch.setattr(looping, "WARM_UP", 1)
    monkeypatch.setitem(looping.PRESETS, "digits", tiny())


@pytest.mark.usefixtures("_tiny")
def test_a_run_leaves_rows_of_every_part(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "rows.jsonl"
    flags = ["--device=cpu", "--threads=1", "--repeats=5", "--images=4", "--size=32", "--workers=1,2"]
    assert training.main([*flags, "--preset=digits", "--batch=2", "--consumes=100", f"--json={file}"]) == 0
    rows = read([file])
    assert all({*KEYS, "op", "shape"} <= set(row) and row["bench"] == "training" for row in rows)
    assert all(row["p20"] <= row["p50"] <= row["p80"] for row in rows)
    found = {(row["op"], row["provider"], row["metric"]): row for row in rows}
    loaders = {(op, provider) for op, provider, _ in found if op.startswith("loader")}
    assert loaders == {
        ("loader-latents", "1 worker"), ("loader-latents", "2 workers"), ("loader-jpeg", "1 worker"),
        ("loader-jpeg", "2 workers"), ("loader-digits", "1 worker"),
    }  # fmt: skip
    for loader in loaders:
        speed, ratio = found[(*loader, "rows_per_s")], found[(*loader, "consumption_ratio")]
        assert speed["p50"] > 0
        assert ratio["p50"] == pytest.approx(speed["p50"] / 100)
    assert found["loader-jpeg", "1 worker", "rows_per_s"]["shape"] == {"B": 4, "C": 3, "H": 32, "W": 32}
    assert found["encode", "tiny", "img_per_s"]["shape"] == {"images": 4, "pixels": 32}
    bare, whole = found["step", "bare", "ms"], found["step", "loop", "ms"]
    assert bare["rounds"] == whole["rounds"] == 5
    assert found["step", "loop", "outside_ms"]["p50"] < whole["p50"]
    assert found["step", "loop", "row_ms"]["p50"] >= 0
    assert ("step", "loop", "overhead_share") in found
    saves = {
        provider: found["save", provider, "stall_ms"] for provider in ("copy", "asynchronous", "synchronous")
    }
    assert saves["copy"]["shape"]["bytes"] > 4 * 4 * 3000  # weights, average, two moments
    assert saves["asynchronous"]["p50"] > 0
    assert found["save", "synchronous", "gb_per_s"]["p50"] > 0
    out = capsys.readouterr().out
    assert f"{len(rows)} rows appended to" in out
    assert not list(tmp_path.glob("bench-*"))
    text = report.markdown(rows)
    assert "| loader-latents | B 4, C 8, H 32, W 32 | 2 workers |" in text
    assert "asynchronous" in text


@pytest.mark.usefixtures("_tiny")
def test_encoded_noise_feeds_a_published_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only its data: the model itself is not built here."""
    from mdt_fast.data import Loader, open_images

    flags = ["--device=cpu", "--batch=2"]
    args = training._parser().parse_args(flags)
    request = training.Request(args, training.command.device("cpu"), training.RowFile(None, {}), tmp_path)
    config = looping.config_of(request)
    assert (config.train.dtype, config.train.compile, config.train.batch_size) == ("float32", "none", 2)
    x, y = next(iter(Loader(open_images(config.data), config.data, batch_size=2, seed=0).batches(0, 1)))
    assert (x.shape, y.shape) == ((2, 8, 32, 32), (2,))
    assert not x.equal(x.flip(-1))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--parts=loder"], "--parts: got 'loder' (did you mean 'loader'?), expected loader, encode"),
        (["--preset=mdtv2-s3"], "--preset: got 'mdtv2-s3' (did you mean 'mdtv2-s2'?), expected digits"),
        (["--repeats=0"], "--repeats: got 0, expected 1 or more"),
        (["--workers=1,x"], "--workers: got 'x', expected an integer, 1 or more"),
        (["--consumes=0"], "--consumes: got 0.0, expected a positive number of img/s"),
        (["--device=tpu"], "--device: got 'tpu', expected auto, cpu, cuda or cuda:N"),
    ],
)
def test_mistakes_are_said_in_a_line(
    flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert training.main(flags) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
