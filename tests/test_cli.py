"""The commands as a person uses them: a whole run, and every mistake in one line with exit code 2."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from mdt_fast.cli import main
from one_line import error
from tiny import ARGUMENTS, file_of

TINY = ["train", "--preset=digits", *ARGUMENTS, "--batch-size=4", "--device=cpu", "--set=sample.steps=3"]

DIGITS = ["train", "--out=x", "--preset=digits"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("cli") / "run"
    assert main([*TINY, "--steps=4", "--save-every=2", f"--out={run}"]) == 0
    return run


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    noise = np.random.default_rng(0)
    for kind in ("cat", "dog", "owl"):
        (tmp_path / "photos" / kind).mkdir(parents=True)
        for i in range(2):
            pixels = noise.integers(0, 256, (20, 17, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / kind / f"{i}.png")
    return tmp_path / "photos"


@pytest.mark.slow
def test_train_sample_convert_as_separate_processes(tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def command(*arguments: str) -> subprocess.CompletedProcess:
        result = subprocess.run(
            [sys.executable, "-m", "mdt_fast", *arguments],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert result.returncode == 0, result.stderr
        return result

    trained = command(*TINY, "--steps=20", "--save-every=10", "--out=run")
    assert re.search(r"step 20/20  loss \d+\.\d+ \(masked \d+\.\d+\)  \d+ img/s  .*0:00 left", trained.stdout)
    for name in ("config.json", "metrics.jsonl", "loss.png", "samples.png"):
        assert (tmp_path / "run" / name).stat().st_size > 100
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == ["step_0000010", "step_0000020"]

    command(
        "sample", "run", "--num-samples=5", "--steps=3", "--cfg-scale=2", "--npz=samples.npz", "--png=pngs"
    )
    with np.load(tmp_path / "samples.npz") as saved:
        assert (saved["arr_0"].shape, saved["arr_0"].dtype) == ((5, 8, 8, 1), np.uint8)
        assert saved["arr_1"].tolist() == [0, 1, 2, 3, 4]
        picture = np.asarray(Image.open(tmp_path / "pngs" / "2_000002.png"))
        np.testing.assert_array_equal(picture, saved["arr_0"][2, :, :, 0])

    command("convert", "run", "ema.safetensors")
    written = load_file(tmp_path / "ema.safetensors")
    expected = load_file(tmp_path / "run" / "checkpoints" / "step_0000020" / file_of("ema"))
    assert {key for key in written if not key.endswith("relative_position_index")} == expected.keys()
    assert all(torch.equal(written[key], expected[key]) for key in expected)


def test_help_is_quick_and_needs_no_torch() -> None:
    code = (
        "import sys; from mdt_fast.cli import main\n"
        "try: main(['train', '--help'])\n"
        "finally: assert 'torch' not in sys.modules"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "mdt-fast train --preset digits --out runs/digits" in result.stdout


def test_resume_and_more_steps(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", f"--out={run}", "--resume=auto", "--steps=6"]) == 0
    assert "6 steps done" in capsys.readouterr().out
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == [2, 4, 6]


def test_resume_before_the_first_checkpoint_keeps_the_settings(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    killed = tmp_path / "killed"
    killed.mkdir()
    config = json.loads((run / "config.json").read_text())
    config["train"]["steps"] = 1234
    (killed / "config.json").write_text(json.dumps(config))
    (killed / "metrics.jsonl").touch()
    assert main(["train", f"--out={killed}", "--resume=auto", "--dry-run"]) == 0
    assert "steps 0 to 1234" in capsys.readouterr().out
    (killed / "config.json").write_text("{")
    assert "config.json: truncated or edited" in error(capsys, "train", f"--out={killed}", "--resume=auto")


def test_threads(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--threads: got 0, expected 1 to 1024" in error(capsys, "sample", str(run), "--threads=0")
    assert main(["sample", str(run), "--threads=1", "--num-samples=2", "--steps=2"]) == 0
    assert torch.get_num_threads() == 1


def test_a_folder_of_images(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = [
        *ARGUMENTS,
        "--steps=2",
        "--batch-size=2",
        "--image-size=16",
        "--set=sample.steps=2",
        "--device=cpu",
    ]
    assert main(["train", f"--data={photos}", f"--out={tmp_path / 'run'}", *options]) == 0
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert [config["model"][key] for key in ("num_classes", "input_size", "in_channels")] == [3, 16, 3]
    assert (
        main(
            ["sample", str(tmp_path / "run"), "--labels=2", "--num-samples=2", f"--npz={tmp_path / 'x.npz'}"]
        )
        == 0
    )
    with np.load(tmp_path / "x.npz") as saved:
        assert (saved["arr_0"].shape, saved["arr_1"].tolist()) == ((2, 16, 16, 3), [2, 2])


@pytest.mark.parametrize("factory", ["MDTv2_S_2", "MDT_S_4", "DiT_S_8"])
def test_dry_run_of_a_published_shape_writes_nothing(
    factory: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert (
        main(
            [
                "train",
                f"--data={photos}",
                f"--model={factory}",
                "--image-size=16",
                f"--out={out}",
                "--dry-run",
            ]
        )
        == 0
    )
    printed = capsys.readouterr().out
    assert "  hidden_size: 384\n" in printed
    assert "6 images in 3 classes" in printed
    assert not out.exists()


def test_both_weights_and_both_formats(run: Path, tmp_path: Path) -> None:
    one, two, three = (tmp_path / name for name in ("a.safetensors", "b.pt", "c.safetensors"))
    assert main(["convert", str(run), str(one), "--weights=model"]) == 0
    assert main(["convert", str(one), str(two)]) == 0
    assert main(["convert", str(two), str(three)]) == 0
    first, last = load_file(one), load_file(three)
    assert all(torch.equal(first[key], last[key]) for key in first)
    saved = load_file(run / "checkpoints" / "step_0000004" / file_of("model"))
    assert all(torch.equal(first[key], saved[key]) for key in saved)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["tarin"], "command: got 'tarin' (did you mean 'train'?)"),
        (["train"], "the following arguments are required: --out"),
        (["train", "--out=x"], "pass --preset digits or --data DIR"),
        (["train", "--out=x", "--preset=digit"], "got 'digit' (did you mean 'digits'?)"),
        ([*DIGITS, "--stpes=3"], "unknown argument '--stpes' (did you mean '--steps'?)"),
        ([*DIGITS, "--steps=many"], "argument --steps: invalid int value: 'many'"),
        ([*DIGITS, "--steps=0"], "--steps: got 0, expected 1 or more"),
        ([*DIGITS, "--model=MDTv2_S_3"], "got 'MDTv2_S_3' (did you mean 'MDTv2_S_2'?)"),
        ([*DIGITS, "--set=model.dept=3"], "no key 'dept' in model (did you mean 'depth'?)"),
        ([*DIGITS, "--set=modl.depth=3"], "no section 'modl' (did you mean 'model'?)"),
        ([*DIGITS, "--set=depth"], "--set: got 'depth', expected SECTION.KEY=VALUE"),
        ([*DIGITS, "--set=model.depth=deep"], "model.depth: got 'deep', expected int"),
        ([*DIGITS, "--set=model.patch_size=3"], "expected a multiple of patch_size 3"),
        ([*DIGITS, "--image-size=16"], "the digits are 8x8"),
        ([*DIGITS, "--device=gpu"], "--device: got 'gpu', expected auto, cpu, cuda or cuda:N"),
        ([*DIGITS, "--device=cuda:99"], "--device: got 'cuda:99', but this machine has"),
        (["train", "--out=x", "--data=nowhere"], "no folder 'nowhere'"),
        (["train", "--out=x", "--resume=nowhere"], "no run or checkpoint at 'nowhere'"),
        (["train", "--out=", "--preset=digits"], "--out: got '', expected a name"),
        (["train", "--out=RUN", "--resume="], "--resume: got '', expected a name"),
        (["train", "--out=RUN", "--preset=nonsense", "--resume=auto"], "--preset: got 'nonsense'"),
        ([*DIGITS, "--set=sample.steps=5000"], "sample.steps: got 5000, expected 1 to 1000"),
        ([*DIGITS, "--set=sample.cfg_scale=NaN"], "sample.cfg_scale: got nan, expected 0 or more"),
        ([*DIGITS, "--set=sample.batch_size=0"], "sample.batch_size: got 0, expected 1 or more"),
        ([*DIGITS, "--set=sample.eta=7"], "sample.eta: got 7.0, expected at most 1"),
        ([*DIGITS, "--set=model.class_dropout_prob=0"], "sample.cfg_scale: a model trained without label"),
        ([*DIGITS, f"--set=model.depth={'[' * 100_000}"], "model.depth: got '[[["),
        (["sample", "RUN", "--npz="], "--npz: got '', expected a name"),
        (["sample", "RUN", "--grid="], "--grid: got '', expected a name"),
        (["sample", "RUN", "--png="], "--png: got '', expected a name"),
        (["sample", "RUN", "--out=new.png"], "--out: got 'new.png', expected a folder; --grid FILE is one"),
        (["sample", "RUN", "--png=new.JPG"], "--png: got 'new.JPG', expected a folder; --grid FILE is one"),
        (["sample", "RUN", "--npz=same", "--grid=./same"], "--npz and --grid need different names"),
        (["sample", "RUN", "--png=new", "--labels=10"], "--labels: got 10, expected 0 to 9"),
        (["sample", "RUN", "--cfg-scale=inf"], "--cfg-scale: got inf, expected a finite number"),
        (["sample", "nowhere", "--npz=x.npz"], "no run or checkpoint at 'nowhere'"),
        (["sample", "RUN", "--sampler=dimm"], "got 'dimm' (did you mean 'ddim'?)"),
        (["sample", "RUN", "--labels=3,x"], "--labels: 'x' is not a class; use indices or names such as 0"),
        (["sample", "RUN", "--cfg-interval=high"], "--cfg-interval: got 'high', expected LOW,HIGH such as"),
        (["sample", "RUN", "--cfg-interval=0.5,0.1"], "--cfg-interval: got 0.5,0.1, expected LOW,HIGH with"),
        (["sample", "RUN", "--skip-below=-1"], "--skip-below: got -1.0, expected 0 or more"),
        (["sample", "RUN", "--guided-channels=2"], "--guided-channels: got 2, expected None or 1 to 1"),
        (["sample", "RUN", "--sampler=unicp"], "got 'unicp' (did you mean 'unipc'?)"),
        (["sample", "RUN", "--sampler=unipc", "--steps=1"], "steps: got 1, expected 2 to 999 with unipc"),
        (["sample", "RUN", "--sampler=dpm++", "--eta=0.5"], "eta: only ddim has one; use 0 with dpm++"),
        (["sample", "RUN", "--out=o", "--npz=x.npz"], "--npz: --out already writes a samples_....npz in its"),
        (["sample", "RUN", "--out=.", "--grid=a.png"], "--grid: got 'a.png', expected a place outside --out"),
        (["sample", "RUN", "--out=o", "--png=./o/a/b"], "--png: got 'o/a/b', expected a place outside --out"),
        (["sample", "RUN", "--out=o", "--shard-size=0"], "--shard-size: got 0, expected 1 or more"),
        (["sample", "RUN", "--shard-size=4"], "--shard-size: needs --out, which is not given"),
        (["sample", "RUN", "--labels=10"], "--labels: got 10, expected 0 to 9"),
        (["sample", "RUN", "--num-samples=0"], "--num-samples: got 0, expected 1 or more"),
        (["sample", "RUN", "--scale-pow=high"], "--scale-pow: got 'high', expected a number, none or auto"),
        (["sample", "RUN", "--steps=2000"], "steps: got 2000, expected 1 to 1000"),
        (["sample", "RUN", "--npz=none/x.npz"], "cannot write 'none/x.npz': no folder 'none'"),
        (["convert", "RUN", "weights.bin"], "weights.bin: ends in '.bin', expected"),
        (["convert", "nowhere", "x.pt"], "no run or checkpoint at 'nowhere'"),
        (["convert", "RUN", "none/x.pt"], "cannot write 'none/x.pt': no folder 'none'"),
    ],
    ids=lambda value: "-".join(value).replace("--", "")[:60] if isinstance(value, list) else "",
)  # fmt: skip
def test_mistakes(
    arguments: list[str], message: str, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert message in error(capsys, *(str(trained) if word == "RUN" else word for word in arguments))
    assert list(tmp_path.iterdir()) == []


def test_a_run_is_not_overwritten(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "already holds a run; use --resume auto" in error(capsys, *TINY, f"--out={run}")
    changed = error(capsys, "train", f"--out={run}", "--resume=auto", "--seed=1", "--steps=6")
    assert "--seed: cannot be changed on resume" in changed


def test_a_learning_rate_may_be_lowered(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    again = ["train", f"--out={run}", "--resume=auto", "--steps=6", "--lr=1e-9"]
    assert main(again) == 0
    assert "train.lr: 1e-09 from here on, 0.003 before" in capsys.readouterr().out
    assert json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["lr"] == pytest.approx(
        1e-9 * 6 / 50
    )
    (tmp_path / "file").write_text("")
    in_the_way = error(capsys, *TINY, f"--out={tmp_path / 'file' / 'run'}")
    assert f"--out: '{tmp_path / 'file'}' is a file; a folder is needed" in in_the_way


def test_checkpoints_are_not_written_over(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run / "checkpoints" / "step_0000004"
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    for arguments in (
        ["convert", str(run), str(folder / "model.safetensors")],
        ["convert", str(run), str(run / "checkpoints" / "x.safetensors")],
        ["sample", str(run), f"--npz={folder / 'state.json'}"],
        ["sample", str(run), f"--grid={folder / 'state.json'}"],
        ["sample", str(run), f"--png={folder / 'new'}"],
        ["sample", str(run), f"--png={run / 'checkpoints'}"],
    ):
        assert "checkpoints are in" in error(capsys, *arguments)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    folder.rename(run / "moved")
    assert "checkpoints are in" in error(capsys, "convert", str(run), str(run / "moved" / "x.pt"))


def test_the_last_lines_list_what_exists(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(self: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("mdt_fast.training.run.Run.draw_final", full)
    assert main([*TINY, "--steps=1", f"--out={tmp_path / 'run'}"]) == 0
    printed = capsys.readouterr().out
    assert "warning: no picture: disk full" in printed
    files = [line.split("/")[-1] for line in printed[printed.rindex("files ") :].splitlines()]
    assert [name for name in files if name != "tensorboard"] == [
        "loss.png", "metrics.jsonl", "config.json", "checkpoints",
    ]  # fmt: skip


@pytest.mark.slow
def test_no_reader_and_no_unicode(tmp_path: Path) -> None:
    """Neither a closed pipe nor a name that the output's encoding lacks ends training."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-m", "mdt_fast", *TINY, "--steps=3", "--set=train.log_every=1", "--out=rün"]
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "wb") as closed:
        process = subprocess.run(
            command, cwd=tmp_path, env=environment, stdout=closed, stderr=subprocess.PIPE, check=False
        )
    assert (process.returncode, process.stderr) == (0, b"")
    assert (tmp_path / "rün" / "checkpoints" / "step_0000003").is_dir()
    again = subprocess.run(
        [*command, "--resume=auto"], cwd=tmp_path, env=environment, capture_output=True, check=True
    )
    assert rb"r\xfcn" in again.stdout


@pytest.mark.parametrize(
    "raised",
    [RuntimeError("DefaultCPUAllocator: can't allocate memory"), torch.OutOfMemoryError(), MemoryError()],
)
def test_out_of_memory_is_one_line(
    raised: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(config: object) -> None:
        raise raised

    monkeypatch.setattr("mdt_fast.training.run.build_model", fail)
    assert "out of memory" in error(capsys, *TINY, f"--out={tmp_path / 'a' / 'run'}")
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_checkpoint(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = run / "checkpoints" / "step_0000004" / file_of("ema")
    broken.write_bytes(broken.read_bytes()[:100])
    good = run / "checkpoints" / "step_0000002"
    for arguments in (["sample", str(run)], ["convert", str(run), str(tmp_path / "x.pt")]):
        message = error(capsys, *arguments)
        assert message.startswith(f"{broken}: truncated, 100 bytes where")
        assert str(good) in message
    assert main(["sample", str(good), "--num-samples=1", f"--grid={tmp_path / 'grid.png'}"]) == 0


def test_weights_files_that_cannot_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = str(tmp_path / "x.safetensors")
    for name in ("torn.pt", "torn.safetensors"):
        (tmp_path / name).write_bytes(b"torn")
        assert name in error(capsys, "convert", str(tmp_path / name), target)
    torch.save({"x": subprocess.run}, tmp_path / "code.pt")
    assert "needs code from the file to be executed" in error(
        capsys, "convert", str(tmp_path / "code.pt"), target
    )
    torch.save({"x": torch.ones(1)}, tmp_path / "same.pt")
    assert "are the same file" in error(
        capsys, "convert", str(tmp_path / "same.pt"), str(tmp_path / "same.pt")
    )


def test_an_out_that_is_a_file_and_an_image_that_is_none(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert "is a file; a folder is needed" in error(capsys, *TINY, f"--out={tmp_path / 'file'}")
    (photos / "cat" / "0.png").write_bytes(b"torn")
    options = [*ARGUMENTS, "--steps=2", "--batch-size=6", "--device=cpu"]
    assert "cannot read image" in error(
        capsys, "train", f"--data={photos}", f"--out={tmp_path / 'run'}", *options
    )
    more = [*options, "--set=model.num_classes=2"]
    assert "3 classes, but the model only 2" in error(
        capsys, "train", f"--data={photos}", f"--out={tmp_path / 'b'}", *more
    )


def test_programming_errors_are_not_swallowed_and_tracebacks_can_be_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("mdt_fast.cli.parse", lambda argv: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            main([])
    monkeypatch.setenv("MDT_FAST_TRACEBACK", "1")
    with pytest.raises(ValueError, match="no run or checkpoint"):
        main(["sample", str(tmp_path / "nowhere")])
