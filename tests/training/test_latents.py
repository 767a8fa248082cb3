"""Training in latent space, end to end: encode, train, sample; raw images encoded on the fly; no labels."""

import shutil
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from autoencoders import save_tiny_vae
from mdt_fast.cli import main
from mdt_fast.config import DataConfig
from mdt_fast.data import (
    Autoencoder,
    Latents,
    LatentSet,
    Loader,
    open_first_stage,
    open_images,
    sample_posterior,
)
from mdt_fast.errors import UserError
from mdt_fast.training.checkpoint import open_checkpoint
from mdt_fast.training.data import check_same_data
from tiny import MODEL

SHAPE = [f"--set=model.{key}={value}" for key, value in {**MODEL, "patch_size": 2}.items()]
FAST = [*SHAPE, "--steps=4", "--batch-size=4", "--save-every=2", "--set=sample.steps=2", "--device=cpu"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, noise = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for kind in ("cat", "dog"):
        (folder / kind).mkdir()
        for i in range(5):
            pixels = noise.integers(0, 256, (20, 17, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / kind / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def latents(photos: Path, tiny_vae: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("latents") / "set"
    options = [f"--vae={tiny_vae}", f"--out={folder}", "--image-size=16", "--shard-size=4", "--device=cpu"]
    assert main(["encode", str(photos), *options]) == 0
    return folder


def test_encode_train_sample(latents: Path, tmp_path: Path) -> None:
    run, npz = tmp_path / "run", tmp_path / "samples.npz"
    assert main(["train", f"--data={latents}", f"--out={run}", *FAST]) == 0
    config = open_checkpoint(run).config
    assert (config.model.input_size, config.model.in_channels, config.model.num_classes) == (8, 4, 2)
    assert (config.data.image_size, config.data.flip) == (16, True)
    assert (run / "samples.png").stat().st_size > 100
    assert main(["sample", str(run), "--num-samples=3", "--steps=2", f"--npz={npz}", "--device=cpu"]) == 0
    with np.load(npz) as saved:
        assert (saved["arr_0"].shape, saved["arr_0"].dtype) == ((3, 16, 16, 3), np.uint8)
    assert main(["train", f"--out={run}", "--resume=auto", "--steps=6"]) == 0


def test_both_ways_to_latents_are_one(photos: Path, latents: Path, tiny_vae: Path) -> None:
    """Encoded beforehand or on the fly: the same images, mirrors, labels and posterior samples."""
    encoded = DataConfig(source=str(latents), image_size=16, channels=3, flip=True)
    raw = DataConfig(source=str(photos), image_size=16, channels=3, flip=True, vae=str(tiny_vae))
    x = []
    for config in (encoded, raw):
        images = open_images(config)
        stage = open_first_stage(config, images)
        assert (stage.channels, stage.size) == (4, 8)
        noise = torch.randn(6, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        batch, labels = next(Loader(images, config, batch_size=6, seed=1).batches(0, 1))
        x.append((stage(batch, noise), labels))
    torch.testing.assert_close(x[0][0], x[1][0], rtol=1e-5, atol=1e-5)
    assert torch.equal(x[0][1], x[1][1])


def test_the_first_stage_is_the_autoencoders(photos: Path, tiny_vae: Path) -> None:
    config = DataConfig(source=str(photos), image_size=16, channels=3, vae=str(tiny_vae))
    stage, autoencoder = open_first_stage(config, open_images(config)), Autoencoder.load(tiny_vae)
    pixels, noise = torch.rand(2, 3, 16, 16) * 2 - 1, torch.randn(2, 4, 8, 8)
    x = stage(pixels, noise)
    expected = sample_posterior(autoencoder.moments(pixels), noise, autoencoder.scale, autoencoder.shift)
    assert torch.equal(x, expected)
    assert torch.equal(stage.decode(x), autoencoder.decode(x))


def test_raw_images_are_encoded_as_they_come(photos: Path, tiny_vae: Path, tmp_path: Path) -> None:
    arguments = [
        "train",
        f"--data={photos}",
        f"--vae={tiny_vae}",
        "--image-size=16",
        f"--out={tmp_path}",
        *FAST,
    ]
    assert main(arguments) == 0
    assert open_checkpoint(tmp_path).config.model.in_channels == 4


def test_without_labels(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["train", f"--data={photos}", "--unconditional", "--image-size=8", f"--out={tmp_path}", *FAST]
    assert main(arguments) == 0
    opened = open_checkpoint(tmp_path)
    assert (opened.config.model.num_classes, opened.config.model.class_dropout_prob) == (1, 0.0)
    assert opened.tensors("ema")["y_embedder.embedding_table.weight"].shape[0] == 1
    npz = tmp_path / "x.npz"
    assert main(["sample", str(tmp_path), "--num-samples=3", "--steps=2", f"--npz={npz}"]) == 0
    with np.load(npz) as saved:
        assert saved["arr_1"].tolist() == [0, 0, 0]
    assert main(["sample", str(tmp_path), "--cfg-scale=2", f"--npz={npz}"]) == 2
    assert "trained without labels, so it cannot be guided" in capsys.readouterr().err


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    assert main(["train", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_refusals(
    photos: Path, latents: Path, tiny_vae: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = f"--out={tmp_path / 'run'}"
    message = refusal(capsys, f"--data={photos}", f"--vae={tiny_vae}", "--image-size=15", out, *FAST)
    assert "--image-size: 15 is not divisible by 2, the pixels per latent" in message
    message = refusal(capsys, f"--data={latents}", out, *FAST, "--set=model.in_channels=3")
    assert "model.in_channels: 3, but the data has 4" in message
    message = refusal(capsys, f"--data={latents}", out, *FAST, "--image-size=32")
    assert "--image-size" in message
    assert not (tmp_path / "run").exists()


def test_encoded_data_that_changed_is_noticed_when_a_run_goes_on(
    photos: Path, latents: Path, tiny_vae: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, other = tmp_path / "run", tmp_path / "other"
    assert main(["train", f"--data={latents}", f"--out={run}", *FAST]) == 0
    options = [f"--vae={tiny_vae}", f"--out={other}", "--image-size=16", "--device=cpu", "--dtype=float16"]
    assert main(["encode", str(photos), *options]) == 0
    capsys.readouterr()
    assert main(["train", f"--data={other}", f"--out={run}", "--resume=auto", "--steps=6"]) == 0
    assert "warning: the encoded data has changed since the run began" in capsys.readouterr().out


def test_images_without_the_autoencoder(latents: Path, tmp_path: Path) -> None:
    """Without the named autoencoder the run goes on, but its pictures are left out."""
    config = DataConfig(source=str(latents), image_size=16, channels=3, vae=str(tmp_path / "gone"))
    images = open_images(config)
    assert isinstance(images, LatentSet)
    stage = open_first_stage(config, images)
    with pytest.raises(UserError, match="gone"):
        stage.decode(torch.zeros(1, 4, 8, 8))
    run = tmp_path / "run"
    arguments = ["train", f"--data={latents}", f"--vae={tmp_path / 'gone'}", f"--out={run}", *FAST]
    assert main(arguments) == 0
    assert not (run / "samples.png").exists()


def test_another_autoencoder_under_the_same_name_is_noticed(
    photos: Path, tiny_vae: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    vae, run = tmp_path / "vae", tmp_path / "run"
    shutil.copytree(tiny_vae, vae)
    assert main(["train", f"--data={photos}", f"--vae={vae}", "--image-size=16", f"--out={run}", *FAST]) == 0
    shutil.rmtree(vae)
    save_tiny_vae(vae, seed=1)
    message = refusal(capsys, f"--out={run}", "--resume=auto", "--steps=6")
    assert "expected the weights that encoded the run's latents" in message
    assert main(["sample", str(run), f"--npz={tmp_path / 'x.npz'}", "--steps=2", "--num-samples=1"]) == 2
    assert "is not the autoencoder that encoded the latents" in capsys.readouterr().err


def test_an_autoencoder_may_move(
    photos: Path, tiny_vae: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Encoding on the fly: its name may change, its weights may not."""
    old, new, run = (tmp_path / name for name in ("old", "new", "run"))
    shutil.copytree(tiny_vae, old)
    assert main(["train", f"--data={photos}", f"--vae={old}", "--image-size=16", f"--out={run}", *FAST]) == 0
    old.rename(new)
    again = ["train", f"--out={run}", "--resume=auto", f"--vae={new}"]
    assert main([*again, "--steps=6"]) == 0
    assert main(["train", f"--out={run}", "--resume=auto", "--steps=8"]) == 0
    opened = open_checkpoint(run)
    assert (opened.step, opened.config.data.vae, opened.state["latents"]["vae"]) == (8, str(new), str(new))
    other = save_tiny_vae(tmp_path / "other", seed=1)
    message = refusal(capsys, *again[1:-1], f"--vae={other}", "--steps=9")
    assert f"--vae: got {str(other)!r}, expected the weights that encoded the run's latents" in message
    message = refusal(capsys, *again[1:-1], "--set=data.vae=none", "--steps=9")
    assert f"data.vae: got None, expected the autoencoder of the run's latents, {str(new)!r}" in message


def test_the_autoencoder_of_encoded_data_may_move(
    photos: Path, tiny_vae: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also if an encode elsewhere has renamed it in the index; the shards stay, and so do the batches."""
    old, new, latents, run = (tmp_path / name for name in ("old", "new", "latents", "run"))
    shutil.copytree(tiny_vae, old)
    encode = ["encode", str(photos), f"--out={latents}", "--image-size=16", "--shard-size=4", "--device=cpu"]
    assert main([*encode, f"--vae={old}"]) == 0
    assert main(["train", f"--data={latents}", f"--out={run}", *FAST]) == 0
    old.rename(new)
    again = ["train", f"--out={run}", "--resume=auto"]
    assert main([*again, "--steps=5", f"--vae={new}"]) == 0  # the index has the old name
    assert open_checkpoint(run).state["latents"]["vae"] == str(new)
    capsys.readouterr()
    assert main([*encode, f"--vae={new}"]) == 0
    assert "nothing to do" in capsys.readouterr().out
    for options in ([], [f"--vae={new}"], [f"--vae={shutil.copytree(new, tmp_path / 'copy')}"]):
        steps = open_checkpoint(run).step + 1
        (run / "samples.png").unlink()
        assert main([*again, f"--steps={steps}", *options]) == 0
        assert "warning: the encoded data has changed" not in capsys.readouterr().out
        assert (run / "samples.png").exists()
    assert open_checkpoint(run).state["latents"]["fingerprint"] == LatentSet(latents).fingerprint
    other = save_tiny_vae(tmp_path / "other", seed=1)
    message = refusal(capsys, *again[1:], f"--vae={other}", "--steps=20")
    assert f"--vae: got {str(other)!r}, expected the weights that encoded the run's latents" in message
    assert "--vae: no folder" in refusal(capsys, *again[1:], f"--vae={tmp_path / 'gone'}", "--steps=20")


def test_a_decoder_of_the_users_choice_may_be_exchanged(
    latents: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It changes pictures only; but the latents' own encoder may not change with it."""
    one, two = (save_tiny_vae(tmp_path / name, seed=seed) for seed, name in ((1, "one"), (2, "two")))
    run, others = tmp_path / "run", tmp_path / "others"
    assert main(["train", f"--data={latents}", f"--vae={one}", f"--out={run}", *FAST]) == 0
    again = [f"--out={run}", "--resume=auto", f"--vae={two}"]
    assert main(["train", *again, "--steps=5"]) == 0
    options = [f"--vae={two}", f"--out={others}", "--image-size=16", "--device=cpu"]
    assert main(["encode", str(photos), *options]) == 0
    assert "expected the weights that encoded" in refusal(capsys, *again, f"--data={others}", "--steps=6")


def test_checkpoints_that_say_less_of_their_autoencoder(latents: Path, photos: Path, tmp_path: Path) -> None:
    """As early versions wrote them: what cannot be compared may not change."""
    vae = str(save_tiny_vae(tmp_path / "vae", seed=1))
    run = tmp_path / "run"
    assert main(["train", f"--data={latents}", f"--vae={vae}", f"--out={run}", *FAST]) == 0
    start = open_checkpoint(run)
    assert start.state.pop("encoder") is not None
    encoded, config = start.config.data, replace(start.config.data, source=str(photos), image_size=16)
    for data, message in ((encoded, None), (config, "data.source: got images, expected encoded latents")):
        images = open_images(data)
        stage = open_first_stage(data, images)
        with nullcontext() if message is None else pytest.raises(UserError, match=message):
            check_same_data(start, replace(start.config, data=data), images, stage)
    del start.state["latents"]
    images = open_images(encoded)
    stage = open_first_stage(encoded, images)
    check_same_data(start, start.config, images, stage)
    moved = replace(start.config, data=replace(encoded, vae="moved"))
    with pytest.raises(UserError, match=f"data.vae: got 'moved', expected '{vae}': the checkpoint has no"):
        check_same_data(start, moved, images, stage)


def test_a_run_on_pixels_takes_no_autoencoder(
    tiny_vae: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", f"--data={photos}", "--image-size=8", f"--out={tmp_path}", *FAST]) == 0
    message = refusal(capsys, f"--out={tmp_path}", "--resume=auto", f"--vae={tiny_vae}", "--steps=6")
    assert f"--vae: got {str(tiny_vae)!r}, expected None: the run is trained on pixels" in message


def test_other_latents_are_noticed_also_where_there_are_more_images(latents: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert main(["train", f"--data={latents}", f"--out={run}", *FAST]) == 0
    start = open_checkpoint(run)
    images = open_images(start.config.data)
    stage = open_first_stage(start.config.data, images)
    assert isinstance(stage, Latents)
    assert check_same_data(start, start.config, images, stage) == []
    fewer: Any = SimpleNamespace(classes=images.classes, labels=images.labels[1:])
    (warning,) = check_same_data(start, start.config, fewer, stage)
    assert "images and now has" in warning
    scale, encoder = stage.scale, stage.encoder
    stage.encoder = "another's"
    with pytest.raises(UserError, match=r"data\.vae: got .*, expected the weights that"):
        check_same_data(start, start.config, fewer, stage)
    stage.encoder, stage.scale = encoder, 2 * scale
    with pytest.raises(UserError, match=f"data.vae: the run's latents have scale {scale:g}, but now it is"):
        check_same_data(start, start.config, images, stage)
