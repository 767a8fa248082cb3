"""``mdt-fast train --config``: what --dry-run prints is read back; nonsense gets one line."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from PIL import Image

from mdt_fast.cli import main
from mdt_fast.commands.config_file import Loader, as_yaml, read_config_file
from mdt_fast.config import DataConfig, RunConfig, from_dict
from mdt_fast.errors import UserError
from mdt_fast.training.checkpoint import open_checkpoint
from tiny import ARGUMENTS, tiny


def test_what_dry_run_prints_is_a_whole_configuration(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [
        "--preset=digits",
        *ARGUMENTS,
        "--steps=2",
        "--set=sample.steps=2",
        "--device=cpu",
        "--lr=1e-4",
    ]
    assert main(["train", f"--out={tmp_path / 'x'}", "--dry-run", *options]) == 0
    file = tmp_path / "run.yaml"
    file.write_text(capsys.readouterr().out)
    assert main(["train", f"--out={tmp_path / 'run'}", f"--config={file}"]) == 0
    config = open_checkpoint(tmp_path / "run").config
    assert (config.train.lr, config.model.hidden_size, config.train.device) == (1e-4, 16, "cpu")


@pytest.mark.parametrize(
    "source", ["1e5", "1e-4", "-7", "0x1F", "1:30", "2024-01-01", "yes", "null", "=", ".5"]
)
def test_what_as_yaml_writes_is_read_back(source: str, tmp_path: Path) -> None:
    config = replace(tiny(lr=1e-300, max_grad_norm=1e22), data=DataConfig(source=source))
    (tmp_path / "run.yaml").write_text(as_yaml(config))
    _, values = read_config_file(tmp_path / "run.yaml")
    assert from_dict(RunConfig, values) == config


@pytest.mark.parametrize("source", ["010", "08", "-007"])
def test_digits_after_a_zero_are_text(source: str, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(f"data: {{source: {source}}}\n")
    assert read_config_file(file) == (None, {"data": {"source": source}})


def test_a_file_an_option_and_set_in_that_order(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("preset: digits\ntrain:\n  lr: 1e-4\n  steps: 7\n  seed: 3\n  warmup_steps: 5\n")
    arguments = [f"--config={file}", "--steps=8", "--seed=4", "--set=train.seed=5"]
    assert main(["train", f"--out={tmp_path / 'x'}", "--dry-run", *arguments]) == 0
    printed = capsys.readouterr().out
    for line in ("lr: 0.0001", "steps: 8", "seed: 5", "warmup_steps: 5"):
        assert f"  {line}\n" in printed


NONSENSE = {
    "{": "not YAML",
    "a: [1": "not YAML",
    "- 1": "got list, expected sections of settings",
    "trian:\n  lr: 1": "unknown section 'trian' (did you mean 'train'?)",
    "train: 3": "train: got 3, expected settings",
    "train:\n  learning_rate: 1": "unknown key 'learning_rate'",
    "train:\n  stepz: 1": "unknown key 'stepz' (did you mean 'steps'?)",
    "preset: 3": "preset: got 3, expected a name",
    "preset: digitz": "got 'digitz' (did you mean 'digits'?)",
    "train: {seed: !!int x}": "not YAML",
    "train: {seed: !!python/object/apply:os.getcwd []}": "not YAML",
    "preset: digits\ntrain: {steps: 2024-13-45}": "train.steps: got '2024-13-45', expected int",
    "preset: digits\ntrain: {seed: 1:30}": "train.seed: got '1:30', expected int",
    "preset: digits\nmodel: {input_size: 1}": "of patch_size 2, such as 2",
    "preset: digits\ndata: {channels: 1.0}": "data.channels: got 1.0 (did you mean '1'?), expected 1, 3",
    f"preset: digits\nsample: {{cfg_interval: [1{400 * '0'}, 2]}}": "sample.cfg_interval: 10000",
    "preset: digits\ntrain: {seed: 010}": "train.seed: got '010', expected int",
    "preset: digits\ntrain: {steps: 0b}": "train.steps: got '0b', expected int",
    "preset: digits\ntrain: {steps: many}": "train.steps: got 'many', expected int",
    'preset: digits\ndata: {source: "a\\0b"}': "has a null character",
    "preset: digits\nmodel: {mlp_ratio: 1e300}": "mlp_ratio: got 1e+300",
    "preset: digits\ndiffusion: {diffusion_steps: 100000000000}": "diffusion_steps: got 100000000000",
}


@pytest.mark.parametrize(("text", "message"), NONSENSE.items(), ids=list(NONSENSE.values()))
def test_nonsense(text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    assert main(["train", f"--out={tmp_path / 'x'}", f"--config={file}", "--dry-run"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--config: cannot read .*: No such file"):
        read_config_file(tmp_path / "none.yaml")


def test_a_run_killed_before_its_first_checkpoint_keeps_its_settings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also those that a new run takes from its data, and if the data has moved."""
    images, moved, out = (tmp_path / name for name in ("images", "moved", "run"))
    for label in "abc":
        (images / label).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(images / label / "0.png")
    shutil.copytree(images, moved)
    options = [*ARGUMENTS, "--set=model.num_classes=10", "--set=sample.cfg_scale=3", "--set=train.lr=0.5"]
    options += ["--image-size=8", "--steps=1", "--batch-size=1", "--device=cpu", "--set=sample.steps=1"]
    assert main(["train", f"--out={out}", f"--data={images}", *options]) == 0
    for path in out.iterdir():  # what a killed run leaves
        if path.name != "config.json":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    saved = json.loads((out / "config.json").read_text())
    for data in (images, moved):
        more = [] if data == images else [f"--data={data}"]
        capsys.readouterr()
        assert main(["train", f"--out={out}", "--resume=auto", "--dry-run", *more]) == 0
        saved["data"]["source"] = str(data)
        assert yaml.load(capsys.readouterr().out, Loader) == saved


@pytest.fixture
def killed(tmp_path: Path) -> Path:
    """What is left of a run killed before its first checkpoint, whose options changed much of its preset."""
    options = ["--preset=dit-s4", "--data=digits", "--image-size=8", "--set=data.vae=none", "--device=cpu"]
    options += ["--set=data.channels=1", "--set=model.depth=1", "--set=model.hidden_size=8", "--lr=0.5"]
    options += ["--set=model.num_heads=2", "--set=train.compile=none", "--dtype=float32", "--batch-size=4"]
    options += ["--set=sample.steps=1", "--steps=1"]
    (tmp_path / "again").write_text("\n".join(options))
    assert main(["train", f"--out={tmp_path / 'run'}", *options]) == 0
    for path in (tmp_path / "run").iterdir():
        if path.name != "config.json":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return tmp_path / "run"


def test_the_same_command_goes_on_with_a_killed_run(killed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With a preset's name as without; also once there is a checkpoint."""
    again = ["train", f"--out={killed}", "--resume=auto"]
    options = (killed.parent / "again").read_text().splitlines()
    saved = json.loads((killed / "config.json").read_text())
    for some in (options, [], ["--preset=digits"], options[:1] + options[5:8] + options[9:10]):
        capsys.readouterr()
        assert main([*again, "--dry-run", *some]) == 0
        printed = capsys.readouterr().out
        assert yaml.load(printed, Loader) == saved
        assert ("are kept" in printed) == (some not in ([], options))
    note = f"# the settings in {killed / 'config.json'} are kept, not those of preset digits: "
    assert main([*again, "--preset=digits", "--dry-run"]) == 0
    assert capsys.readouterr().out.startswith(f"{note}model.family=dit (preset: mdtv2), ")
    assert main([*again, *options]) == 0
    assert "are kept" not in capsys.readouterr().out
    assert main([*again, *options, "--steps=2"]) == 0
    assert main([*again, "--preset=mdtv2-s2", "--steps=3"]) == 2


def test_a_model_by_its_name_is_not_said_to_be_kept(killed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["train", f"--out={killed}", "--resume=auto", "--preset=digits", "--model=DiT_S_2", "--dry-run"]
    assert main(command) == 0
    note, *printed = capsys.readouterr().out.splitlines()
    assert "  hidden_size: 384" in printed
    assert "are kept" in note
    assert "hidden_size" not in note


def test_a_killed_run_is_not_one_of_another_shape(killed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", f"--out={killed}", "--resume=auto", "--preset=mdtv2-s2"]) == 2
    said = f"--preset: 'mdtv2-s2' has model.family=mdtv2, the run in {str(killed)!r} has dit; a resumed run"
    assert said in capsys.readouterr().err


def test_another_preset_than_the_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--preset=digits", *ARGUMENTS, "--steps=1", "--set=sample.steps=1", "--device=cpu"]
    assert main(["train", f"--out={tmp_path}", *options]) == 0
    assert main(["train", f"--out={tmp_path}", "--preset=dit-s4", "--resume=auto"]) == 2
    assert "--preset: 'dit-s4' has model.family=dit, the run in" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("preset", "model", "expected"),
    [
        ("dit-s2", "MDTv2_S_2", {"mask_ratio": 0.3, "min_snr_gamma": 5.0, "scale_pow": 4.0}),
        ("mdtv2-s2", "DiT_S_2", {"mask_ratio": None, "min_snr_gamma": None, "scale_pow": None}),
        ("mdtv2-s2", "MDT_S_2", {"mask_ratio": 0.3, "min_snr_gamma": None, "scale_pow": 4.0}),
        ("mdtv2-s2", "MDTv2_B_2", {"mask_ratio": 0.3, "min_snr_gamma": 5.0, "scale_pow": 4.0}),
        ("images", "MDT_S_2", {"mask_ratio": 0.3, "min_snr_gamma": None, "scale_pow": None}),
    ],
    ids=str,
)
def test_another_familys_shape_brings_its_objective(
    preset: str,
    model: str,
    expected: dict[str, float | None],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    """The whole objective, not half of what another model was published with."""
    options = [f"--preset={preset}", f"--model={model}", "--data=digits", "--image-size=8", "--dry-run"]
    more = ["--set=data.vae=none", "--set=data.channels=1", "--set=train.dtype=float32"]
    assert main(["train", f"--out={tmp_path / 'x'}", *options, *more]) == 0
    printed = capsys.readouterr().out
    for key, value in expected.items():
        assert f"  {key}: {'null' if value is None else value}\n" in printed


@pytest.mark.parametrize("way", ["config", "set"])
def test_a_family_that_is_named_as_well_changes_nothing(
    way: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "c.yaml").write_text("model: {family: dit}\n")
    named = {"config": f"--config={tmp_path / 'c.yaml'}", "set": "--set=model.family=dit"}[way]
    options = ["--preset=digits", "--model=DiT_S_2", named, "--dry-run"]
    assert main(["train", f"--out={tmp_path / 'x'}", *options]) == 0
    printed = capsys.readouterr().out
    assert "  min_snr_gamma: null\n" in printed
    assert "  mask_ratio: null\n" in printed


def test_what_is_set_by_hand_wins_over_the_familys(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    options = ["--preset=digits", "--model=DiT_S_2", "--set=diffusion.min_snr_gamma=3", "--dry-run"]
    assert main(["train", f"--out={tmp_path / 'x'}", *options]) == 0
    assert "  min_snr_gamma: 3.0\n" in capsys.readouterr().out
