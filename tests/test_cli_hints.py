"""What the commands say unasked: hints, notes and help."""

import importlib
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import mdt_fast
from mdt_fast.cli import main
from mdt_fast.models.float8 import use_float8
from mdt_fast.training.optim import unripe
from one_line import error
from tiny import ARGUMENTS

TRAIN = ["train", "--preset=digits", *ARGUMENTS, "--batch-size=4", "--device=cpu", "--set=sample.steps=2"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("hints") / "run"
    assert main([*TRAIN, "--steps=4", "--lr=0.5", "--set=train.warmup_steps=0", f"--out={run}"]) == 0
    return run


def test_an_average_of_the_initial_weights_is_told() -> None:
    assert unripe(0.995, 597) is not None
    assert unripe(0.995, 598) is None  # 0.995^598 = 0.0499...
    assert unripe(0.0, 1) is None
    assert "(train.ema_decay=0.995) is still 47% initial weights" in str(unripe(0.995, 150))


def test_a_short_training_and_its_samples_say_so(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    says = "after 4 steps the EMA (train.ema_decay=0.995) is still 98% initial weights"
    assert main([*TRAIN, "--steps=4", f"--out={tmp_path / 'run'}"]) == 0
    assert says in capsys.readouterr().out
    assert main([*TRAIN, "--steps=2", "--set=train.ema_decay=0.1", f"--out={tmp_path / 'b'}"]) == 0
    assert "warning" not in capsys.readouterr().out
    drawn = {}
    for weights in ("ema", "model"):
        file = tmp_path / f"{weights}.npz"
        assert main(["sample", str(trained), "--num-samples=2", f"--weights={weights}", f"--npz={file}"]) == 0
        assert (says in capsys.readouterr().out) == (weights == "ema")
        with np.load(file) as saved:
            drawn[weights] = saved["arr_0"]
    assert (drawn["ema"] != drawn["model"]).any()
    for weights in ("ema", "model"):
        file = tmp_path / f"{weights}.safetensors"
        assert main(["convert", str(trained), str(file), f"--weights={weights}"]) == 0
        out = capsys.readouterr().out
        assert (says in out and "convert it with --weights model" in out) == (weights == "ema")
    for source, target, *more in (
        (tmp_path / "ema.safetensors", tmp_path / "x.pt"), (trained, tmp_path / "x", "--official"),
        (tmp_path / "ema.safetensors", tmp_path / "x", "--data=digits"),
    ):  # fmt: skip
        said = error(capsys, "convert", str(source), str(target), "--weights=model", *more)
        assert said.startswith("--weights: ")


def test_a_folder_is_of_one_kind_of_weights(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["sample", str(trained), "--num-samples=2", f"--out={tmp_path / 'o'}"]
    assert main(command) == 0
    assert 'was begun without --weights, now it is "model"' in error(capsys, *command, "--weights=model")


def test_all_that_a_training_leaves_is_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    assert main([*TRAIN, "--steps=2", "--save-every=1", f"--out={run}"]) == 0
    lines = capsys.readouterr().out.splitlines()
    listed = lines[next(i for i, line in enumerate(lines) if line.startswith("files ")) :]
    names = [Path(line.split()[-1]).name for line in listed]
    assert sorted(names) == sorted(path.name for path in run.iterdir() if not path.name.startswith("."))


def test_a_folder_that_goes_on_says_what_is_there(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["sample", str(trained), "--num-samples=5", "--shard-size=2", f"--out={tmp_path / 'o'}"]
    assert main(command) == 0
    assert "already" not in capsys.readouterr().out
    (tmp_path / "o" / "shard-00002.npz").unlink()
    assert main(command) == 0
    assert "4 of 5 images already exist\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--vae=nosuch"], "--vae: the run was trained on pixels and uses no autoencoder"),
        (["--npz=x.txt"], "--npz: got 'x.txt', expected a name that ends in .npz"),
        (["--steps=0"], "--steps: got 0, expected 1 to 1000"),
        (["--sampler=ddpm", "--eta=1"], "--eta: only ddim has one; use 0 with ddpm, got 1"),
        (["--eta=2"], "--eta: got 2.0, expected at most 1"),
        (["--cfg-interval=5,1"], "--cfg-interval: got 5,1, expected LOW,HIGH with 0 <= LOW <= HIGH"),
        (["--cfg-scale=inf"], "--cfg-scale: got inf, expected a finite number"),
        (["--batch-size=0"], "--batch-size: got 0, expected 1 or more"),
        (["--seed=-1"], "--seed: got -1, expected 0 or more"),
        (["--image=MASK", "--mask=MASK", "--hide=2"], "--hide: got 2.0, expected 0 to 1"),
        (["--image=nosuch.png", "--mask=MASK"], "--image: cannot read image 'nosuch.png'"),
        (["--image=MASK", "--mask=nosuch.png"], "--mask: cannot read image 'nosuch.png'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_name_the_option(
    options: list[str], message: str, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mask = tmp_path / "mask.png"
    Image.fromarray(np.full((8, 8), 255, np.uint8)).save(mask)
    given = [option.replace("MASK", str(mask)) for option in options]
    assert error(capsys, "sample", str(trained), *given).startswith(message)
    assert list(tmp_path.iterdir()) == [mask]


def test_labels_of_a_run_without(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    assert main([*TRAIN, "--steps=1", "--unconditional", f"--out={run}"]) == 0
    assert "--labels: the run was trained without labels" in error(capsys, "sample", str(run), "--labels=3")


def test_bare_it_prints_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    printed = capsys.readouterr()
    assert "evaluate" in printed.out
    assert (
        printed.err == "mdt-fast: error: the following arguments are required: COMMAND; see mdt-fast --help\n"
    )


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("sample", "how many images (default: the run's)"),
        ("sample", "image i depends only on the seed, i, its class and the settings (default: the run's)"),
        ("train", "Settings not given come from the preset, or with --resume from the run."),
        ("doctor", "Report what this machine has"),
        ("encode", "usage: mdt-fast encode SOURCE --vae PATH|NAME --image-size N --out DIR [OPTION ...]"),
        ("encode", "an AutoencoderKL (required to encode)"),
    ],
)
def test_helps_say_it(command: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([command, "--help"])
    assert says in " ".join(capsys.readouterr().out.split())


def test_every_option_that_the_run_decides_says_so() -> None:
    from mdt_fast.cli import build_parser
    from mdt_fast.commands.sample_request import OPTIONS
    from mdt_fast.options import OF_RUN

    of_run = {action.dest for action in build_parser()[1]["sample"]._actions if OF_RUN in (action.help or "")}
    assert of_run == {*OPTIONS, "scale_pow", "cfg_interval"}


def test_misspelt_names_are_answered_with_the_nearest() -> None:
    for name, near in (
        ("MDTV2", "MDTv2"),
        ("SampleConfigs", "SampleConfig"),
        ("create_difusion", "create_diffusion"),
    ):
        with pytest.raises(AttributeError, match=rf"no attribute '{name}' \(did you mean '{near}'\?\)"):
            getattr(mdt_fast, name)
    with pytest.raises(AttributeError, match=r"no attribute '_zzz'$"):
        mdt_fast._zzz  # noqa: B018


@pytest.mark.parametrize("where", ["sample", "decode"])
def test_a_picture_without_memory_does_not_end_the_run(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    place = {"sample": "training.run.sample", "decode": "data.first_stage.FirstStage.decode"}[where]
    monkeypatch.setattr(f"mdt_fast.{place}", full)
    assert main([*TRAIN, "--steps=2", "--set=train.save_every=1", f"--out={tmp_path / 'run'}"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("warning: no picture") >= 1
    assert "not enough GPU memory" in printed
    assert "2 steps done" in printed


@pytest.mark.parametrize("setting", ["train.compile=none", "train.checkpointing=none", "train.wandb=none"])
def test_none_is_a_word_where_it_is_one(
    setting: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert main([*TRAIN, "--dry-run", f"--out={tmp_path / 'x'}", f"--set={setting}"]) == 0
    name = setting.partition("=")[0].partition(".")[2]
    assert f"  {name}: {'null' if name == 'wandb' else 'none'}\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("setting", "printed"),
    [
        ("train.wandb=2024", "wandb: '2024'"),
        ("train.wandb=true", "wandb: 'true'"),
        ("train.wandb=1e5", "wandb: '1e5'"),
        ("train.wandb=[a]", "wandb: '[a]'"),
        ('train.wandb="none"', "wandb: none"),
        ("train.wandb=null", "wandb: null"),
        ("sample.cfg_interval=0,1", "cfg_interval:\n  - 0.0\n  - 1.0"),
        ("sample.cfg_interval=[100,7e2]", "cfg_interval:\n  - 100.0\n  - 700.0"),
        ("sample.cfg_interval=none", "cfg_interval: null"),
    ],
)
def test_text_is_taken_as_typed_and_intervals_as_in_the_option(
    setting: str, printed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr("mdt_fast.training.settings.imported_wandb", lambda: None)
    capsys.readouterr()
    assert main([*TRAIN, "--dry-run", f"--out={tmp_path / 'x'}", f"--set={setting}"]) == 0
    assert f"  {printed}\n" in capsys.readouterr().out


def test_an_interval_of_no_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = error(capsys, *TRAIN, f"--out={tmp_path / 'x'}", "--set=sample.cfg_interval=0,high")
    assert said == "sample.cfg_interval: got '0,high', expected None or two numbers"


def test_a_run_with_nothing_to_do_is_no_new_run(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    new, own = f"--out={tmp_path / 'new'}", f"--out={trained}"
    before = (trained / "config.json").read_bytes()
    for arguments, least in (
        ([new, f"--resume={trained}"], 5),
        ([new, f"--resume={trained}", "--steps=3"], 5),
        ([own, "--resume=auto", "--steps=3"], 4),
    ):
        said = error(capsys, "train", *arguments)
        assert f"is at step 4; use at least {least}, got" in said
    assert not (tmp_path / "new").exists()
    assert (trained / "config.json").read_bytes() == before
    assert main(["train", own, "--resume=auto"]) == 0  # as a restarted job does
    assert main(["train", new, f"--resume={trained}", "--steps=5", "--set=sample.steps=2"]) == 0
    assert (tmp_path / "new" / "checkpoints" / "step_0000005").is_dir()


def test_images_without_classes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(4):
        Image.fromarray(np.full((8, 8, 3), 60 * i, np.uint8)).save(folder / f"{i}.png")
    arguments = ["train", f"--data={folder}", "--image-size=8", f"--out={tmp_path / 'run'}", *ARGUMENTS]
    assert "for images without classes use train --unconditional" in error(capsys, *arguments)
    assert main([*arguments, "--unconditional", "--dry-run"]) == 0
    assert "4 images in 1 classes" in capsys.readouterr().out


def test_pictures_of_two_calls_are_not_mixed(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "pngs"
    sample = ["sample", str(trained), "--steps=2", f"--png={folder}"]
    assert main([*sample, "--num-samples=3"]) == 0
    assert main([*sample, "--num-samples=3", "--seed=1"]) == 0  # replaces those
    for _ in range(2):  # a grid in the folder is not one of its pictures
        assert main([*sample, "--num-samples=3", f"--grid={folder / 'grid.png'}"]) == 0
    (folder / "grid.png").unlink()
    said = error(capsys, *sample, "--num-samples=2")
    assert said.startswith("--png: ")
    assert "holds 1 other pictures, such as '2_000002.png'" in said
    assert len(list(folder.iterdir())) == 3


def test_settings_go_by_the_option_that_was_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    out = f"--out={tmp_path / 'x'}"
    assert error(capsys, *TRAIN, out, "--dtype=half").startswith("--dtype: got 'half', expected")
    assert error(capsys, *TRAIN, out, "--set=train.dtype=half").startswith("train.dtype: got 'half'")
    assert error(capsys, "train", "--data=nowhere", out).startswith("--data: no folder 'nowhere'")
    assert "wandb: cannot be imported" in error(capsys, *TRAIN, out, "--set=train.wandb=x", "--dry-run")
    assert not (tmp_path / "x").exists()


def test_a_reader_that_has_enough_is_no_error(tmp_path: Path) -> None:
    """The exit code is a shell's for SIGPIPE. (Without the optional packages, whose imports take long.)"""
    code = "import runpy; from mdt_fast import doctor; doctor.optional_packages = list; "
    code += "runpy.run_module('mdt_fast', run_name='__main__')"
    command = shlex.join([sys.executable, "-c", code, "doctor", "--json"])
    command += f" 2>{tmp_path / 'err'} | true; exit ${{PIPESTATUS[0]}}"
    assert subprocess.run(["bash", "-c", command], timeout=120).returncode == 141
    assert (tmp_path / "err").read_text() == ""


def test_another_pipe_that_breaks_is_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(json: bool) -> int:
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr("mdt_fast.doctor.main", broken)
    assert error(capsys, "doctor") == "[Errno 32] Broken pipe"


def test_numbers_beyond_all_measure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = f"--out={tmp_path / 'x'}"
    assert error(capsys, *TRAIN, out, f"--batch-size={10**20}").endswith(", expected below 2^63")
    said = error(capsys, *TRAIN, out, "--set=diffusion.min_snr_gamma=1e308")
    assert ", expected None or above 0, and a float32" in said
    assert not (tmp_path / "x").exists()


def test_a_full_disk_is_named(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sys.modules["mdt_fast.commands.sample"], "save_npz", full)
    said = error(capsys, "sample", str(trained), "--steps=2", f"--npz={tmp_path / 'x.npz'}")
    assert said == f"--npz: cannot write '{tmp_path / 'x.npz'}': No space left on device"


def test_float8_says_what_it_needs(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sample = "sample", str(trained), "--float8", "--device=cpu"
    assert error(capsys, *sample) == "--float8: needs --dtype bfloat16, got float32"
    needs = "--float8: needs a GPU of compute capability 8.9, 9.0, 10.0, 10.3, the model is on cpu"
    assert error(capsys, *sample, "--dtype=bfloat16") == needs
    assert not (trained / "grid.png").exists()


def test_float8_draws_what_an_exact_model_draws_nearly(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Emulated, into a folder that only the same command may continue."""
    commands = importlib.import_module("mdt_fast.commands.sample")
    monkeypatch.setattr("mdt_fast.commands.sample_request.check_float8", lambda device, config: None)
    converted: list[int] = []
    monkeypatch.setattr(
        commands, "use_float8", lambda model: converted.append(use_float8(model, emulate=True))
    )
    plain = ["sample", str(trained), "--device=cpu", "--dtype=bfloat16", "--num-samples=4"]
    assert main([*plain, f"--out={tmp_path / 'exact'}"]) == 0
    assert main([*plain, "--float8", f"--out={tmp_path / 'rounded'}"]) == 0
    exact, rounded = (
        np.load(tmp_path / name / "samples_4x8x8x1.npz")["arr_0"].astype(float)
        for name in ("exact", "rounded")
    )
    assert abs(exact - rounded).mean() < 8
    assert converted == [4 * 3]  # two blocks and the side block
    assert main([*plain, f"--out={tmp_path / 'rounded'}"]) == 2
