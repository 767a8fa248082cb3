"""A run as a pipeline, in Python and by ``mdt-fast convert --diffusers``; weights out of a pipeline again."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from autoencoders import save_tiny_vae
from mdt_fast import MDTPipeline, Transformer, UserError, read_weights
from mdt_fast.cli import main
from mdt_fast.sampling.generate import PerImageNoise
from mdt_fast.training.checkpoint import open_checkpoint
from mdt_fast.training.states import whole_state
from tiny import ARGUMENTS, MODEL

SHAPE = [f"--set=model.{key}={value}" for key, value in {**MODEL, "patch_size": 2}.items()]
SHORT = ["--steps=2", "--save-every=2", "--batch-size=4", "--device=cpu", "--set=sample.steps=2"]


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("digits") / "run"
    assert main(["train", "--preset=digits", *ARGUMENTS, *SHORT, f"--out={run}"]) == 0
    return run


@pytest.fixture(scope="module")
def latents(tiny_vae: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on latents of photographs that are encoded on the fly."""
    folder, noise = tmp_path_factory.mktemp("latents"), np.random.default_rng(0)
    for kind in ("cat", "dog"):
        (folder / "photos" / kind).mkdir(parents=True)
        for i in range(2):
            pixels = noise.integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "photos" / kind / f"{i}.png")
    vae, run = shutil.copytree(tiny_vae, folder / "vae"), folder / "run"
    data = [f"--data={folder / 'photos'}", f"--vae={vae}", "--image-size=16"]
    assert main(["train", *data, *SHAPE, *SHORT, f"--out={run}"]) == 0
    return run


def drawn(pipe: MDTPipeline, labels: list[int], output_type: str = "np") -> np.ndarray:
    pipe.set_progress_bar_config(disable=True)
    noise = PerImageNoise(0, 0, len(labels)).generators
    return pipe(labels, 2.0, noise, 3, output_type).images


@pytest.mark.parametrize("run", ["digits", "latents"])
def test_a_run_draws_the_same_as_a_pipeline(
    run: str, tmp_path: Path, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    """The pictures of ``mdt-fast sample``: its sampler, EMA weights and autoencoder."""
    folder, npz, pipeline = request.getfixturevalue(run), tmp_path / "x.npz", tmp_path / "a" / "pipe"
    options = ["--num-samples=4", "--labels=1,0", "--steps=3", "--cfg-scale=2", "--seed=0", f"--npz={npz}"]
    assert main(["sample", str(folder), *options, "--device=cpu"]) == 0
    assert main(["convert", str(folder), str(pipeline), "--diffusers"]) == 0
    assert f"load it with MDTPipeline.from_pretrained({str(pipeline)!r})" in capsys.readouterr().out
    with np.load(npz) as saved:
        expected = saved["arr_0"].astype(float)
    for pipe in (MDTPipeline.from_pretrained(pipeline), MDTPipeline.from_run(folder)):
        pictures = drawn(pipe, [1, 0, 1, 0]) * 255
        assert pictures.shape == expected.shape
        # .npz files are truncated; this is float.
        assert np.abs(pictures - expected - 0.5).max() <= 0.51
        assert type(pipe.scheduler).__name__ == "DDIMScheduler"
        assert list(pipe.labels) == sorted(open_checkpoint(folder).classes)
        assert (pipe.vae is None) == (run == "digits")


def test_weights_out_of_a_pipeline(digits: Path, tmp_path: Path) -> None:
    pipe, model = tmp_path / "pipe", tmp_path / "model"
    assert main(["convert", str(digits), str(pipe), "--diffusers", "--weights=model"]) == 0
    assert main(["convert", str(pipe), str(tmp_path / "one.safetensors")]) == 0
    Transformer.from_pretrained(pipe / "transformer").save_pretrained(model)
    assert main(["convert", str(model), str(tmp_path / "two.pt")]) == 0
    expected = whole_state(open_checkpoint(digits), "model")
    for name in ("one.safetensors", "two.pt"):
        state = read_weights(tmp_path / name)
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[key], expected[key]) for key in state)


def test_another_autoencoder(latents: Path, tmp_path: Path) -> None:
    other = save_tiny_vae(tmp_path / "other", seed=1)
    usual, changed = MDTPipeline.from_run(latents), MDTPipeline.from_run(latents, vae=other)
    assert not torch.equal(usual.vae.decoder.conv_in.weight, changed.vae.decoder.conv_in.weight)
    assert main(["convert", str(latents), str(tmp_path / "pipe"), "--diffusers", f"--vae={other}"]) == 0
    loaded = MDTPipeline.from_pretrained(tmp_path / "pipe")
    assert torch.equal(loaded.vae.decoder.conv_in.weight, changed.vae.decoder.conv_in.weight)


def test_an_autoencoder_that_says_another_scale(latents: Path, tmp_path: Path) -> None:
    """Latents are decoded as they were encoded, with the run's scale, in a pipeline and by the command."""
    other = save_tiny_vae(tmp_path / "other", scaling_factor=2.0, shift_factor=0.3)
    usual, changed = MDTPipeline.from_run(latents), MDTPipeline.from_run(latents, vae=other)
    assert (changed.vae.config.scaling_factor, changed.vae.config.shift_factor) == (
        usual.vae.config.scaling_factor, usual.vae.config.shift_factor or 0.0,
    )  # fmt: skip
    assert np.array_equal(drawn(changed, [1, 0]), drawn(usual, [1, 0]))
    pictures = []
    for name, more in (("usual", []), ("other", [f"--vae={other}"])):
        file = tmp_path / f"{name}.npz"
        assert main(["sample", str(latents), "--num-samples=2", f"--npz={file}", "--device=cpu", *more]) == 0
        pictures.append(np.load(file)["arr_0"])
    assert np.array_equal(*pictures)


def test_refusals(digits: Path, latents: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    full = tmp_path / "full"
    full.mkdir()
    (full / "file").write_text("")
    refused: Callable[..., str] = lambda *arguments: (  # noqa: E731
        capsys.readouterr(), main(["convert", *map(str, arguments), "--diffusers"]), capsys.readouterr().err
    )[2]  # fmt: skip
    for arguments, message in (
        ((digits, full), "it already holds files; choose another folder"),
        ((tmp_path / "none", tmp_path / "x"), "no run or checkpoint at"),
        ((digits, tmp_path / "x", "--official"), "pass only one"),
        ((digits, tmp_path / "x", "--data=photos"), "--data: does not apply to a pipeline; leave it out"),
        ((digits, tmp_path / "x", f"--vae={tmp_path}"), "vae: the run was trained on pixels and needs none"),
        ((latents, tmp_path / "x", f"--vae={full}"), "vae: no autoencoder in"),
        ((digits, digits / "checkpoints" / "x"), "choose another place"),
    ):
        text = refused(*arguments)
        assert message in text, text
        assert text.count("\n") == 1
    assert not (tmp_path / "x").exists()
    with pytest.raises(UserError, match="weights: got 'last', expected ema or model"):
        MDTPipeline.from_run(digits, weights="last")


@pytest.mark.parametrize("there", [False, True], ids=["no folder", "an empty folder"])
def test_a_killed_conversion_is_repeated(
    there: bool, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped before the last file it leaves nothing; killed there, it leaves what a repeat removes."""
    target = tmp_path / "a" / "pipe"
    if there:
        target.mkdir(parents=True)
    command = ["convert", str(digits), str(target), "--diffusers"]
    kept = tmp_path / "kept"

    def stopped(pipe: MDTPipeline, folder: Path, **how: object) -> None:
        shutil.copytree(folder, kept / Path(folder).name)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(MDTPipeline, "save_config", stopped)
        assert main(command) == 130
    place = target if there else target.parent
    assert not list(place.iterdir())
    shutil.copytree(kept, place, dirs_exist_ok=True)  # as if it had been killed
    assert [path.suffix for path in place.iterdir()] == [".partial"]
    assert main(command) == 0
    parts = ["model_index.json", "scheduler", "transformer"]
    assert sorted(path.name for path in target.iterdir()) == parts
    assert list(target.parent.iterdir()) == [target]
    MDTPipeline.from_pretrained(target)
