"""Weight files in place of a run: pictures, steps and pipelines from them, and errors for unusable ones."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from autoencoders import save_tiny_vae
from mdt_fast import MDT_S_8, DiT_S_8, UserError, load_run, sample, write_weights
from mdt_fast.cli import main
from mdt_fast.config import DiffusionConfig, to_dict
from mdt_fast.data import described_stage
from mdt_fast.models.convert import read_metadata
from mdt_fast.presets import PRESETS
from mdt_fast.sampling import to_uint8
from mdt_fast.training.from_weights import open_for_drawing
from one_line import error

Capture = pytest.CaptureFixture[str]
SHORT = ["--device=cpu", "--threads=1", "--steps=2", "--batch-size=2"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("weights") / "run"
    size = ["--set=model.hidden_size=32", "--set=model.depth=4", "--set=model.num_heads=2"]
    options = ["--batch-size=4", "--device=cpu", "--threads=1", "--steps=2", "--set=sample.sampler=ddpm"]
    assert main(["train", "--preset=digits", *size, *options, f"--out={run}"]) == 0
    return run


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The average of MDT-S/8 as the official code saves it, but in half the bytes."""
    torch.manual_seed(0)
    model = MDT_S_8(mask_ratio=0.3, decode_layer=2)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.02)
    path = tmp_path_factory.mktemp("published") / "mdt_s8.pt"
    torch.save(
        {name: v.half() if v.is_floating_point() else v for name, v in model.state_dict().items()}, path
    )
    return path


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, noise = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for kind in ("cat", "zebra, striped"):
        (folder / kind).mkdir()
        for i in range(3):
            pixels = noise.integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / kind / f"{i}.png")
    return folder


def drawn_alike(run: Path, folder: Path, *options: str) -> Path:
    """The weight file made of a run, after checking that both draw the same bits."""
    file = folder / "x.safetensors"
    assert main(["convert", str(run), str(file)]) == 0
    options = ("--num-samples=3", *options)
    images, labels = pictures(str(file), *options, out=folder / "file.npz")
    expected = pictures(str(run), *options, out=folder / "run.npz")
    assert np.array_equal(images, expected[0])
    assert labels == expected[1]
    return file


def pictures(*arguments: str, out: Path) -> tuple[np.ndarray, list[int]]:
    assert main(["sample", *arguments, *SHORT, f"--npz={out}"]) == 0
    with np.load(out) as saved:
        return saved["arr_0"], saved["arr_1"].tolist()


def test_what_convert_wrote_draws_as_its_run_does(trained: Path, tmp_path: Path) -> None:
    """With the run's sampler and class names."""
    file = tmp_path / "digits.safetensors"
    assert main(["convert", str(trained), str(file)]) == 0
    options = ("--num-samples=4", "--labels=3,7")
    images, labels = pictures(str(file), *options, out=tmp_path / "file.npz")
    expected = pictures(str(trained), *options, out=tmp_path / "run.npz")
    assert np.array_equal(images, expected[0])
    assert labels == expected[1] == [3, 7, 3, 7]
    model, of_run = load_run(file), load_run(trained)
    assert model.config == of_run.config
    assert all(map(torch.equal, model.parameters(), of_run.parameters()))
    (opened,) = {open_for_drawing(path, "ema", "{}").config.sample for path in (file, trained)}
    assert opened.sampler == "ddpm"
    assert open_for_drawing(file, "ema", "{}").step == 2


SMALL = [
    "--set=model.hidden_size=32", "--set=model.depth=4", "--set=model.num_heads=2", "--batch-size=2",
    "--device=cpu", "--threads=1", "--steps=1", "--image-size=16", "--set=train.save_every=1",
]  # fmt: skip


def test_latents_another_process_and_classes_by_name(photos: Path, tmp_path: Path, capsys: Capture) -> None:
    run, vae = tmp_path / "run", save_tiny_vae(tmp_path / "vae")
    process = ["--set=diffusion.noise_schedule=linear", "--set=diffusion.predict_xstart=true"]
    command = ["train", f"--data={photos}", f"--vae={vae}", f"--out={run}", *SMALL, *process]
    assert main([*command, "--set=model.patch_size=2"]) == 0
    file = drawn_alike(run, tmp_path, "--labels=zebra, striped,cat", "--cfg-scale=3")
    again, other = tmp_path / "again.safetensors", tmp_path / "other.safetensors"
    assert main(["convert", str(file), str(again)]) == 0
    assert (
        read_metadata(again).items()
        >= {key: value for key, value in read_metadata(file).items() if key != "weights"}.items()
    )
    shutil.rmtree(vae)
    save_tiny_vae(vae, seed=1)
    grid = f"--grid={tmp_path / 'x.png'}"
    assert "is not the autoencoder that encoded the latents" in error(
        capsys, "sample", str(file), grid, *SHORT
    )
    beside = {key: json.loads(value) for key, value in read_metadata(file).items()}
    for name in ("model", "diffusion"):
        write_weights(other, load_file(file), **{key: v for key, v in beside.items() if key != name})
        assert "no published model has this shape" in error(capsys, "sample", str(other), grid, *SHORT)


@pytest.mark.parametrize("options", [["--unconditional"], ["--set=model.class_dropout_prob=0"]])
def test_pixels_in_colour(photos: Path, tmp_path: Path, capsys: Capture, options: list[str]) -> None:
    """Without classes, and without a null class for guidance."""
    run = tmp_path / "run"
    data = photos / "cat" if options == ["--unconditional"] else photos
    unguided = ["--set=sample.cfg_scale=1"]
    command = ["train", f"--data={data}", f"--out={run}", *SMALL, *options, *unguided]
    assert main([*command, "--set=model.patch_size=4"]) == 0
    file = drawn_alike(run, tmp_path)
    if options == ["--unconditional"]:
        said = error(capsys, "sample", str(file), "--labels=0", f"--grid={tmp_path / 'x.png'}")
        assert said == "--labels: the run was trained without labels; leave it out"


def test_what_weights_are_taken_as_is_told(
    published: Path, tiny_vae: Path, tmp_path: Path, capsys: Capture
) -> None:
    options = (f"--vae={tiny_vae}", "--num-samples=1")
    pictures(str(published), *options, out=tmp_path / "x.npz")
    said = capsys.readouterr().out
    assert "taken as the published mdt-s8: 1000 classes, 2 decoder blocks" in said
    assert "warning" not in said  # about an average that is still young


def test_an_autoencoder_of_other_latents(tmp_path: Path, capsys: Capture) -> None:
    vae, file = save_tiny_vae(tmp_path / "vae", latent_channels=8), tmp_path / "dit.pt"
    torch.save(DiT_S_8().state_dict(), file)
    grid = f"--grid={tmp_path / 'x.png'}"
    said = error(capsys, "sample", str(file), grid, f"--vae={vae}", *SHORT)
    assert said.endswith("have 8 channels, but the model's have 4")


def test_a_file_named_like_a_checkpoint_is_weights(trained: Path, tmp_path: Path) -> None:
    file, run = tmp_path / "step_0000004.safetensors", tmp_path / "run"
    assert main(["convert", str(trained), str(file)]) == 0
    assert main(["convert", str(file), str(run), "--preset=digits", "--set=data.flip=false"]) == 0
    assert (run / "config.json").is_file()


def test_a_folder_of_shards_knows_its_weights(trained: Path, tmp_path: Path, capsys: Capture) -> None:
    file, out = tmp_path / "digits.safetensors", tmp_path / "out"
    assert main(["convert", str(trained), str(file)]) == 0
    command = ["sample", str(file), *SHORT, "--num-samples=3", f"--out={out}"]
    assert main(command) == 0
    assert main(command) == 0
    state = load_file(file)
    state["pos_embed"] += 1
    beside = {key: json.loads(value) for key, value in read_metadata(file).items()}
    write_weights(file, state, **beside)
    assert "was begun with checkpoint" in error(capsys, *command)


def test_a_published_model_draws_by_its_recipe(published: Path, tiny_vae: Path, tmp_path: Path) -> None:
    """The shape identifies the model; a local autoencoder decodes."""
    options = (f"--vae={tiny_vae}", "--num-samples=2", "--labels=207,360")
    images, labels = pictures(str(published), *options, out=tmp_path / "x.npz")
    assert images.shape == (2, 64, 64, 3)
    assert labels == [207, 360]
    opened = open_for_drawing(published, "ema", "{}")
    preset = PRESETS["mdt-s8"]
    assert opened.config.model == preset.model
    assert opened.config.diffusion == preset.diffusion
    assert opened.config.sample == preset.sample
    assert opened.state["latents"]["scale"] == 0.18215
    assert opened.state["latents"]["vae"] == preset.data.vae
    model = load_run(published)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    config = replace(opened.config.sample, steps=2, batch_size=2)
    latents = sample(model, preset.diffusion, labels, config, clip_denoised=False)
    stage = described_stage(opened.state["latents"], replace(opened.config.data, vae=str(tiny_vae)))
    assert np.array_equal(images, to_uint8(stage.decode(latents)))


def test_weights_without_classes_and_of_pixels(tmp_path: Path, capsys: Capture) -> None:
    """A DiT-S/8 of grey pictures, whose label table has one row."""
    file = tmp_path / "grey.pt"
    model = DiT_S_8(in_channels=1, num_classes=1, class_dropout_prob=0.0)
    torch.save({"model": {}, "ema": model.state_dict()}, file)
    images, labels = pictures(str(file), "--num-samples=2", out=tmp_path / "x.npz")
    assert images.shape == (2, 32, 32, 1)
    assert labels == [0, 0]
    guided = ["sample", str(file), *SHORT, "--cfg-scale=2", f"--grid={tmp_path / 'x.png'}"]
    assert "--cfg-scale" in error(capsys, *guided)
    assert "--vae: " in error(capsys, "sample", str(file), *SHORT, "--vae=x", f"--grid={tmp_path / 'x.png'}")


def test_a_pipeline_of_weights(published: Path, tiny_vae: Path, tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    from mdt_fast import MDTPipeline

    folder = tmp_path / "pipeline"
    assert main(["convert", str(published), str(folder), "--diffusers", f"--vae={tiny_vae}"]) == 0
    pipeline = MDTPipeline.from_pretrained(folder)
    weights = load_run(published)
    assert all(map(torch.equal, pipeline.transformer.parameters(), weights.parameters()))
    assert pipeline.vae is not None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("pos_embed"), "not weights of an MDT, MDTv2 or DiT (lacks 'pos_embed')"),
        (lambda state: state["pos_embed"].fill_(float("nan")), "weights that are not finite"),
        (
            lambda state: state.update(mask_token=torch.full((1, 1, 384), 1e300, dtype=torch.float64)),
            "not finite",
        ),
        (
            lambda state: state.update({"x_embedder.proj.weight": torch.zeros(384, 4, 0, 0)}),
            "shapes do not match",
        ),
        (lambda state: state.pop("mask_token"), "weights of another model: 1 missing (mask_token)"),
        (lambda state: state.update(x=torch.zeros(1)), "weights of another model: 1 unexpected (x)"),
    ],
)
def test_damaged_weights(published: Path, tmp_path: Path, capsys: Capture, change: Any, message: str) -> None:
    state = torch.load(published)
    change(state)
    torch.save(state, tmp_path / "x.pt")
    assert message in error(capsys, "sample", str(tmp_path / "x.pt"), f"--grid={tmp_path / 'x.png'}", *SHORT)


def test_weights_that_do_not_say_what_they_are(trained: Path, tmp_path: Path, capsys: Capture) -> None:
    """An unpublished shape in a file without a configuration, a damaged configuration, and a missing file."""
    file, bare = tmp_path / "digits.safetensors", tmp_path / "bare.safetensors"
    assert main(["convert", str(trained), str(file)]) == 0
    grid = f"--grid={tmp_path / 'x.png'}"
    save_file(load_file(file), bare)
    message = f"{bare}: no published model has this shape, and the file has no configuration"
    assert message in error(capsys, "sample", str(bare), grid)
    assert message in error(capsys, "export", str(bare), str(tmp_path / "x.pt2"))
    with pytest.raises(UserError, match="no published model has this shape"):
        load_run(bare)
    save_file(load_file(file), bare, metadata={"model": "[" * 100_000})
    assert "its 'model' cannot be read: " in error(capsys, "sample", str(bare), grid)
    assert "none.pt: no such file" in error(capsys, "sample", str(tmp_path / "none.pt"), grid)
    assert "has one set of weights" in error(capsys, "sample", str(file), "--weights=model", grid)
    assert "sample: nothing to write; pass --npz FILE, --grid FILE" in error(capsys, "sample", str(file))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"depth": 10**9}}, "weights of another model: depth 4 instead of 1000000000"),
        (
            {"model": {"num_classes": 10**18}},
            "its label table has 11 rows, but its model 1000000000000000000",
        ),
        ({"model": {"wings": 2}}, "its 'model' cannot be read: "),
        ({"diffusion": {"diffusion_steps": 10**15}}, ", expected 1 to 100000"),
        ({"diffusion": []}, "its 'diffusion' cannot be read: "),
        ({"sample": {"cfg_interval": [1]}}, "its 'sample' cannot be read: "),
        ({"classes": ["a"] * 11}, "has 11 classes, but its model 10"),
        ({"classes": []}, "has 0 classes, but its model 10"),
        ({"classes": [1]}, "its 'classes' cannot be read: [1]"),
        ({"step": True}, "its 'step' cannot be read: True"),
        ({"latents": []}, "its 'latents' cannot be read: []"),
        ({"latents": {"scale": 1.0}}, "its 'latents' cannot be read: {'scale': 1.0}"),
        ({"latents": {"scale": 0, "shift": 0.0}}, "its 'latents' cannot be read: "),
        ({"latents": {"scale": 1.0, "shift": 0.0, "vae": ["x"]}}, "its 'latents' cannot be read: "),
    ],
)
def test_what_stands_beside_weights_is_checked(
    trained: Path, tmp_path: Path, capsys: Capture, changes: dict[str, Any], message: str
) -> None:
    file = tmp_path / "x.safetensors"
    assert main(["convert", str(trained), str(file)]) == 0
    beside = {key: json.loads(value) for key, value in read_metadata(file).items()}
    for key, value in changes.items():
        merge = isinstance(beside[key], dict) and isinstance(value, dict)
        beside[key] = {**beside[key], **value} if merge else value
    write_weights(file, load_file(file), **beside)
    assert message in error(capsys, "sample", str(file), f"--grid={tmp_path / 'x.png'}", *SHORT)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--set=model.family=dit"], "model.family: 'dit', but the weights in {} are mdtv2"),
        (["--model=DiT_S_2"], "--model: 'DiT_S_2' is dit, but the weights in {} are mdtv2"),
        (
            ["--model=DiT_S_2", "--set=model.family=mdt"],
            "model.family: 'mdt', but the weights in {} are mdtv2",
        ),
        (["--model=MDTv2_S_2"], "--model: 'MDTv2_S_2' has hidden_size 384, but the weights in {} have 32"),
        (["--set=model.patch_size=4"], "model.patch_size: 4, but the weights in {} have 2"),
        (["--preset=dit-s2"], "--preset: 'dit-s2' is a recipe for dit, but the weights in {} are mdtv2"),
    ],
    ids=str,
)
def test_what_contradicts_the_weights_is_named_by_its_option(
    trained: Path, tmp_path: Path, capsys: Capture, options: list[str], said: str
) -> None:
    weights = tmp_path / "w.pt"
    assert main(["convert", str(trained), str(weights)]) == 0
    begin = ["convert", str(weights), str(tmp_path / "run"), "--data=digits"]
    preset = [] if options[0].startswith("--preset") else ["--preset=digits"]
    assert error(capsys, *begin, *preset, *options) == said.format(weights)


def test_latents_of_three_channels(tmp_path: Path) -> None:
    """Taken as latents if the file says so: some autoencoders' latents have as many channels as pictures."""
    vae, file = save_tiny_vae(tmp_path / "vae", latent_channels=3), tmp_path / "x.safetensors"
    model = DiT_S_8(input_size=8, in_channels=3, num_classes=2)
    latents = {"scale": 0.5, "shift": 0.0, "vae": str(vae), "fingerprint": None}
    beside = {"model": to_dict(model.config), "diffusion": to_dict(DiffusionConfig())}
    write_weights(file, model.state_dict(), latents=latents, **beside)
    images, _ = pictures(str(file), "--num-samples=2", out=tmp_path / "x.npz")
    assert images.shape == (2, 16, 16, 3)


def test_an_autoencoder_that_cannot_be_had_is_told_before_anything_is_drawn(
    published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setattr("mdt_fast.sampling.Sampler.__call__", lambda *_: pytest.fail("drew"))
    options = [f"--vae={tmp_path / 'none'}", f"--grid={tmp_path / 'x.png'}"]
    assert str(tmp_path / "none") in error(capsys, "sample", str(published), *SHORT, *options)
