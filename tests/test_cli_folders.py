"""Users' folders: numbers as names, broken files, classes added later; and output beside a run, which is
never overwritten."""

import hashlib
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mdt_fast.cli import main
from mdt_fast.models.convert import read_metadata, read_weights
from mdt_fast.sampling import to_uint8
from mdt_fast.training.metrics import read_rows
from one_line import error
from tiny import ARGUMENTS

TRAIN = ["train", "--image-size=8", *ARGUMENTS, "--batch-size=4", "--device=cpu", "--set=sample.steps=2"]
NAMES = ("007", "1", "10", "2")


@pytest.fixture(scope="module")
def numbers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, and beside it its folder of pictures with a subfolder for each class."""
    root = tmp_path_factory.mktemp("numbers")
    for seed, name in enumerate(NAMES):
        picture(root / "data" / name / "0.png", seed)
    assert main([*TRAIN, f"--data={root / 'data'}", "--steps=2", f"--out={root / 'run'}"]) == 0
    return root


def picture(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(path)


@pytest.mark.parametrize(("asked", "drawn"), [("2", 3), ("10", 2), ("007", 0), ("1", 1), ("0", 0), ("3", 3)])
def test_a_number_that_is_a_name_is_that_class(numbers: Path, tmp_path: Path, asked: str, drawn: int) -> None:
    arguments = ["sample", str(numbers / "run"), "--num-samples=1", f"--labels={asked}", "--device=cpu"]
    assert main([*arguments, f"--npz={tmp_path / 'x.npz'}"]) == 0
    assert np.load(tmp_path / "x.npz")["arr_1"].tolist() == [drawn]


def test_arrays_alone_are_written_as_they_are_drawn(
    numbers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Same bytes as beside a grid, which needs all at once; a run broken off leaves no file."""
    arguments = ["sample", str(numbers / "run"), "--num-samples=5", "--batch-size=2", "--device=cpu"]
    assert main([*arguments, f"--npz={tmp_path / 'a.npz'}"]) == 0
    assert main([*arguments, f"--npz={tmp_path / 'b.npz'}", f"--grid={tmp_path / 'b.png'}"]) == 0
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    shapes: list[int] = []

    def batch(x: torch.Tensor) -> np.ndarray:
        shapes.append(len(x))
        if len(shapes) == 3:
            assert [*tmp_path.glob(".c.npz.*")]  # it is being written
            raise KeyboardInterrupt
        return to_uint8(x)

    monkeypatch.setattr(sys.modules["mdt_fast.commands.sample"], "to_uint8", batch)
    assert main([*arguments, f"--npz={tmp_path / 'c.npz'}"]) == 130
    assert shapes == [2, 2, 1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.npz", "b.npz", "b.png"]


def test_a_class_that_came_later_is_named(
    numbers: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in numbers.glob("data/*/*"):
        picture(tmp_path / path.parent.name / path.name, 0)
    picture(tmp_path / "zz" / "0.png", 9)
    run = numbers / "run"
    said = error(capsys, "train", f"--data={tmp_path}", f"--out={run}", "--resume=auto", "--steps=3")
    assert said == f"--data: its classes differ from those of the run in {str(run)!r}: 1 new (zz)"


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("--grid={}/metrics.jsonl", "it belongs to the run; choose another name"),
        ("--grid={}/other.jpg", "other.jpg', expected a name that ends in .png"),
    ],
)
def test_a_picture_takes_no_files_place(
    numbers: Path, option: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = numbers / "run"
    before = {path: path.read_bytes() for path in run.iterdir() if path.is_file()}
    assert said in error(capsys, "sample", str(run), option.format(run))
    assert {path: path.read_bytes() for path in run.iterdir() if path.is_file()} == before


def test_a_runs_own_files_are_no_targets(numbers: Path, capsys: pytest.CaptureFixture[str]) -> None:
    samples, run = numbers / "x.npz", numbers / "run"
    assert main(["sample", str(run), "--num-samples=4", "--device=cpu", f"--npz={samples}"]) == 0
    said = error(
        capsys, "evaluate", str(samples), "--reference", str(samples), f"--json={run / 'config.json'}"
    )
    assert said.endswith("it belongs to the run; choose another name")


LOOP = "--out: got 'loop', expected a folder: 'loop' is a link to nothing"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train", "--data=x", "--out=loop"], LOOP),
        (["train", "--out=loop", "--resume=RUN"], LOOP),
        (
            ["train", "--out=gone/run", "--resume=RUN"],
            "--out: got 'gone/run', expected a folder: 'gone' is a link to nothing",
        ),
        (["train", "--out=new", "--resume=loop"], "no run or checkpoint at 'loop'"),
        (["sample", "RUN", "--png=loop"], "cannot write 'loop': 'loop' is a link to nothing"),
        (["sample", "RUN", "--out=gone/x"], "cannot write 'gone/x': 'gone' is a link to nothing"),
        (["sample", "RUN", "--npz=loop/x.npz"], "cannot write 'loop/x.npz': 'loop' is a link to nothing"),
        (["sample", "RUN", "--npz=loop", "--grid=./loop"], "sample: --npz and --grid need different names"),
        (["evaluate", "loop", "--reference=x", "--json=loop"], "evaluate: 'loop' is both an input and an"),
        (["evaluate", "loop", "--reference=x"], "SAMPLES: no file or folder 'loop'"),
    ],
    ids=lambda value: "-".join(value).replace("--", "") if isinstance(value, list) else "",
)
def test_links_that_lead_nowhere(
    numbers: Path, arguments: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    for link, target in (("loop", "back"), ("back", "loop"), ("gone", "nowhere")):
        Path(link).symlink_to(target)
    run = str(numbers / "run")
    assert said in error(capsys, *(word.replace("RUN", run) for word in arguments))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "gone", "loop"]


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (["train", "--preset=digits", "--out=x\udcff"], "--out"),
        (["train", "--out=x\udcff/y", "--resume=RUN"], "--out"),
        (["convert", "RUN", "x\udcff.safetensors"], "convert"),
        (["convert", "RUN", "x\udcff", "--official"], "convert"),
        (["evaluate", "x.npz", "--save-features=x\udcff.safetensors"], "--save-features"),
        (["export", "RUN", "x\udcff.pt2"], "export"),
    ],
    ids=["train", "fork", "convert", "official", "features", "export"],
)
def test_names_that_no_library_opens_again(
    numbers: Path, arguments: list[str], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    run = str(numbers / "run")
    said = error(capsys, *(word.replace("RUN", run) for word in arguments))
    assert said.startswith(f"{name}: got '")
    assert said.endswith(r"', expected a name in UTF-8")
    assert r"x\udcff" in said
    assert list(tmp_path.iterdir()) == []


def test_pictures_and_arrays_may_have_any_name(numbers: Path, tmp_path: Path) -> None:
    arguments = ["sample", str(numbers / "run"), "--num-samples=1", "--device=cpu"]
    assert main([*arguments, f"--npz={tmp_path}/x\udcff.npz", f"--png={tmp_path}/y\udcff"]) == 0
    assert np.load(tmp_path / "x\udcff.npz")["arr_1"].tolist() == [0]
    assert len(list((tmp_path / "y\udcff").iterdir())) == 1


@pytest.mark.parametrize("threads", [1025, 10**20])
def test_no_more_threads_than_libraries_start(
    numbers: Path, threads: int, capsys: pytest.CaptureFixture[str]
) -> None:
    said = error(capsys, "sample", str(numbers / "run"), f"--threads={threads}")
    assert said == f"--threads: got {threads}, expected 1 to 1024"


def test_broken_files_that_are_left_out_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed in range(3):
        picture(tmp_path / "data" / "c" / f"{seed}.png", seed)
    for name in ("a.png", "b.png"):
        (tmp_path / "data" / "c" / name).write_bytes(b"")
    arguments = [
        *TRAIN,
        f"--data={tmp_path / 'data'}",
        "--set=data.on_unreadable=skip",
        "--set=train.log_every=1",
    ]
    assert main([*arguments, "--steps=6", f"--out={tmp_path / 'run'}"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "warning: 2 unreadable images replaced by others; the first: " in said
    assert said.count("unreadable images replaced by others") <= 2
    assert len(read_rows(tmp_path / "run" / "metrics.jsonl")) == 6


def test_equal_weights_are_equal_bytes(numbers: Path, tmp_path: Path) -> None:
    digests = set()
    for i in range(4):
        path = tmp_path / f"{i}.safetensors"
        assert main(["convert", str(numbers / "run"), str(path)]) == 0
        digests.add(hashlib.sha256(path.read_bytes()).hexdigest())
        assert {"model", "diffusion", "step"} <= read_metadata(path).keys()
        assert all(torch.isfinite(tensor).all() for tensor in read_weights(path).values())
    assert len(digests) == 1


def test_weights_with_classes_begin_a_run_without(
    numbers: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights, run = tmp_path / "w.safetensors", tmp_path / "run"
    assert main(["convert", str(numbers / "run"), str(weights)]) == 0
    data = numbers / "data"
    begin = ["convert", str(weights), str(run), f"--data={data}", "--image-size=8", "--unconditional"]
    assert main([*begin, "--set=train.batch_size=4", "--set=train.device=cpu"]) == 0
    assert main(["train", f"--out={run}", "--resume=auto", "--steps=1"]) == 0
    for target in (["official", "--official"], ["alone.safetensors"]):
        assert main(["convert", str(run), str(tmp_path / target[0]), *target[1:]]) == 0
    for source in ("official", "alone.safetensors"):
        back = ["convert", str(tmp_path / source), str(tmp_path / f"from_{source[0]}"), "--preset=images"]
        back += [f"--data={data}", "--image-size=8"]
        assert "its label table has one row: a model without classes; pass --unconditional" in error(
            capsys, *back
        )
        assert main([*back, "--unconditional"]) == 0
