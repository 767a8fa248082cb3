"""A file of weights and the model's configuration, as ``mdt-fast convert`` writes it."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from mdt_fast import write_weights
from mdt_fast.cli import main
from mdt_fast.config import DiffusionConfig, ModelConfig, to_dict
from mdt_fast.models.zoo import build_model
from mdt_fast.training import train
from mdt_fast.training.checkpoint import open_checkpoint
from tiny import tiny

DATA = ["--data=digits", "--image-size=8", "--set=data.channels=1"]
MODELS = {
    "dit": {"family": "dit", "num_heads": 8, "mask_ratio": None, "decode_layer": 0},
    "mdt": {"family": "mdt", "depth": 4, "decode_layer": 3},
    "mdtv2": {"depth": 5, "decode_layer": 2, "mlp_ratio": 2.3, "mask_ratio": 0.5},
}
PROCESS = DiffusionConfig(noise_schedule="squaredcos_cap_v2", predict_xstart=True, min_snr_gamma=None)
"""MODELS differ in what weights do not tell: heads, a decoder, a dropped block, a rounded width, a ratio."""


def written(folder: Path, name: str) -> tuple[ModelConfig, Path]:
    config = replace(tiny().model, **MODELS[name])
    path = folder / "weights.safetensors"
    write_weights(path, build_model(config).state_dict(), model=to_dict(config), diffusion=to_dict(PROCESS))
    return config, path


@pytest.mark.parametrize("preset", [[], ["--preset=digits"]], ids=["no preset", "digits"])
@pytest.mark.parametrize("name", MODELS)
def test_a_run_has_the_models_configuration(name: str, preset: list[str], tmp_path: Path) -> None:
    config, path = written(tmp_path, name)
    if preset:
        preset = [*preset, f"--set=model.family={config.family}"]
    assert main(["convert", str(path), str(tmp_path / "run"), *preset, *DATA]) == 0
    opened = open_checkpoint(tmp_path / "run").config
    assert (opened.model, opened.diffusion) == (config, PROCESS)


def test_what_convert_writes_is_enough(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained = replace(tiny(steps=1, tensorboard=False), diffusion=PROCESS)
    train(trained, tmp_path / "old")
    assert main(["convert", str(tmp_path / "old"), str(tmp_path / "w.safetensors")]) == 0
    assert main(["convert", str(tmp_path / "w.safetensors"), str(tmp_path / "new"), *DATA]) == 0
    printed = capsys.readouterr().out
    assert "preset digits, as no published model has this shape" in printed
    assert "the model and its diffusion: as written in w.safetensors" in printed
    opened = open_checkpoint(tmp_path / "new").config
    assert (opened.model, opened.diffusion) == (trained.model, PROCESS)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("train.ema_decay=1.0", "train.ema_decay: got 1.0, expected [0, 1)"),
        ("diffusion.min_snr_gamma=0", "diffusion.min_snr_gamma: got 0.0, expected None or above 0"),
    ],
)
def test_a_run_that_could_not_go_on_is_not_made(
    setting: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path, "mdt")[1]
    assert main(["convert", str(path), str(tmp_path / "run"), *DATA, f"--set={setting}"]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_without_the_process_a_preset_is_needed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny().model
    write_weights(tmp_path / "w.safetensors", build_model(config).state_dict(), model=to_dict(config))
    assert main(["convert", str(tmp_path / "w.safetensors"), str(tmp_path / "run"), *DATA]) == 2
    assert "--preset: needed, as no published model has the shape" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("num_heads=4", "model.num_heads: 4, but the weights in"),
        ("class_dropout_prob=0", "have a null class"),
        ("class_dropout_prob=0.2", ""),
    ],
)
def test_what_is_set_by_hand(
    setting: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A setting that would change what the weights compute is refused, one that changes training accepted."""
    config, path = written(tmp_path, "dit")
    code = main(["convert", str(path), str(tmp_path / "run"), *DATA, f"--set=model.{setting}"])
    assert code == (2 if message else 0)
    assert message in capsys.readouterr().err
    if not message:
        assert open_checkpoint(tmp_path / "run").config.model == replace(config, class_dropout_prob=0.2)


def test_of_another_program_the_file_is_its_weights(tmp_path: Path) -> None:
    config = tiny().model
    write_weights(tmp_path / "w.safetensors", build_model(config).state_dict(), model={"type": "mdt"})
    settings = tmp_path / "settings.yaml"
    settings.write_text(json.dumps({"preset": "digits", **to_dict(tiny())}))
    assert (
        main(["convert", str(tmp_path / "w.safetensors"), str(tmp_path / "run"), f"--config={settings}"]) == 0
    )
    assert open_checkpoint(tmp_path / "run").config == tiny()
    assert torch.equal(*(open_checkpoint(tmp_path / "run").tensors(p)["pos_embed"] for p in ("ema", "model")))


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for kind in ("cat", "dog"):
        (folder / kind).mkdir()
        for i in range(2):
            Image.new("RGB", (20, 20), (40 * i, 90, 160)).save(folder / kind / f"{i}.png")
    return folder


def on_photos(folder: Path, **sizes: object) -> Path:
    config = replace(tiny().model, **{"input_size": 16, "in_channels": 3, "num_classes": 2} | sizes)
    path = folder / "weights.safetensors"
    values = to_dict(config), to_dict(PROCESS)
    write_weights(path, build_model(config).state_dict(), model=values[0], diffusion=values[1], latents=None)
    return path


def test_a_model_on_pixels_says_what_images_it_takes(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path, "mdtv2")[1]
    assert main(["convert", str(path), str(tmp_path / "digits"), "--data=digits"]) == 0
    opened = open_checkpoint(tmp_path / "digits").config
    assert (opened.data.image_size, opened.data.channels, opened.data.flip) == (8, 1, False)
    path = on_photos(tmp_path)
    assert main(["convert", str(path), str(tmp_path / "run"), f"--data={photos}"]) == 0
    opened = open_checkpoint(tmp_path / "run").config
    assert (opened.data.image_size, opened.data.channels, opened.model.input_size) == (16, 3, 16)
    assert "as in weights.safetensors: data.image_size 16 (not 32)" in capsys.readouterr().out


def test_another_size_is_resized_on_request_only(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    convert = ["convert", str(on_photos(tmp_path)), str(tmp_path / "run"), f"--data={photos}"]
    assert main([*convert, "--image-size=20"]) == 2
    said = "model.input_size: 16, but the data has 20; --image-size 16 fits the images to it, --set model."
    assert said in capsys.readouterr().err
    assert main([*convert, "--set=model.input_size=20"]) == 0
    opened = open_checkpoint(tmp_path / "run").config
    assert (opened.data.image_size, opened.model.input_size) == (20, 20)
    (tmp_path / "d").mkdir()
    one = on_photos(tmp_path / "d", in_channels=1, num_classes=10)
    assert main(["convert", str(one), str(tmp_path / "digits"), "--data=digits"]) == 2
    error = capsys.readouterr().err
    assert "model.input_size: 16, but the data has 8; --set model.input_size=8 resizes" in error
