"""``mdt-fast export``: a run's step as a file, and every mistake in one line with exit code 2."""

from pathlib import Path

import numpy as np
import pytest

from mdt_fast.cli import main
from mdt_fast.config import SampleConfig
from mdt_fast.errors import UserError
from mdt_fast.sampling import read_description, run_exported, to_uint8
from tiny import ARGUMENTS


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("export") / "run"
    options = [*ARGUMENTS, "--batch-size=4", "--device=cpu", "--set=sample.steps=3", "--steps=1"]
    assert main(["train", "--preset=digits", *options, f"--out={run}"]) == 0
    return run


def test_the_file_draws_what_the_run_draws(run: Path, tmp_path: Path) -> None:
    step, npz = tmp_path / "step.pt2", tmp_path / "x.npz"
    assert main(["export", str(run), str(step), "--device=cpu"]) == 0
    assert main(["sample", str(run), "--num-samples=3", f"--npz={npz}", "--device=cpu"]) == 0
    with np.load(npz) as saved:
        drawn = to_uint8(run_exported(step, saved["arr_1"].tolist()))
        assert abs(drawn.astype(int) - saved["arr_0"]).max() <= 1
    described = read_description(step)
    assert described["classes"] == [str(digit) for digit in range(10)]
    assert (described["batch"], described["clip"]) == (None, True)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "x.pt2"], "no run or checkpoint at 'nowhere'"),
        (["RUN", "x.pt"], "export: got 'x.pt', expected a name that ends in .pt2"),
        (["RUN", "none/x.pt2"], "cannot write 'none/x.pt2': no folder 'none'"),
        (["RUN", "x.pt2", "--batch=0"], "--batch: got '0', expected dynamic or a number from 1 to 65536"),
        (["RUN", "x.pt2", "--batch=many"], "--batch: got 'many', expected dynamic or a number from 1 to"),
        (
            ["RUN", "x.pt2", "--batch=99999999999999999999"],
            ", expected dynamic or a number from 1 to 65536",
        ),
        (["RUN", "x.pt2", "--device=tpu"], "'tpu'"),
        (["RUN"], "the following arguments are required: FILE"),
    ],
)
def test_a_mistake_ends_in_one_line(
    run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    assert main(["export", *(str(run) if word == "RUN" else word for word in arguments)]) == 2
    captured = capsys.readouterr().err
    assert message in captured
    assert captured.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_of_a_solver_and_without_labels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What the exported step cannot do is left out of its defaults."""
    options = [*ARGUMENTS, "--batch-size=4", "--device=cpu", "--set=sample.sampler=unipc", "--steps=1"]
    run, step = tmp_path / "run", tmp_path / "step.pt2"
    training = ["train", "--preset=digits", *options, "--set=sample.steps=3", "--unconditional"]
    assert main([*training, f"--out={run}"]) == 0
    assert main(["export", str(run), str(step), "--batch=2", "--device=cpu"]) == 0
    assert "the run samples with unipc from diffusers, which is not in the file" in capsys.readouterr().out
    described = read_description(step)
    assert (described["sample"]["sampler"], described["guided"], described["batch"]) == ("ddim", False, 2)
    with pytest.raises(UserError, match="cfg_scale: a model trained without label dropout cannot"):
        run_exported(step, [0], SampleConfig(cfg_scale=2.0))
