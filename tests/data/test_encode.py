"""Encoding by one process or several, stopped or not, gives the same bytes; misfits are refused by name."""

import io
import os
import random
import resource
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from autoencoders import save_tiny_vae
from mdt_fast.config import DataConfig
from mdt_fast.data import LatentSet, open_images
from mdt_fast.data.encode import Encoded, encode
from mdt_fast.errors import UserError


@pytest.fixture
def config(tiny_vae: Path, tmp_path: Path) -> DataConfig:
    """Eleven images in two classes, encoded in three shards of four."""
    for index in range(11):
        pixels = np.random.default_rng(index).integers(0, 256, (20, 18, 3), dtype=np.uint8)
        folder = tmp_path / "photos" / str(index % 2)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / f"{index:02}.png")
    return DataConfig(source=str(tmp_path / "photos"), image_size=16, channels=3, vae=str(tiny_vae))


def run(config: DataConfig, out: Path, **options: object) -> Encoded:
    return encode(config, out, **{"batch_size": 2, "shard_size": 4, **options})  # type: ignore[arg-type]


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def as_rank(monkeypatch: pytest.MonkeyPatch, rank: int, world: int) -> None:
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", str(world))


def test_a_run_reports_and_a_second_one_has_nothing_to_do(config: DataConfig, tmp_path: Path) -> None:
    screen = io.StringIO()
    out = tmp_path / "latents"
    done = run(config, out, console=Console(file=screen, width=200))
    assert (done.images, done.shards, done.of_shards, done.dropped, done.stopped) == (11, 3, 3, 0, False)
    assert (done.index, done.wrote_index) == (out / "index.json", True)
    lines = screen.getvalue().splitlines()
    assert lines[0].startswith("encoding: 2/11  ")
    assert lines[-1].startswith("encoding: 11/11  ")
    assert lines[-1].endswith(" images/s  0:00 left")
    files = {f"shard-0000{i}.{kind}" for i in range(3) for kind in ("json", "safetensors")} | {"index.json"}
    assert set(content(out)) == files
    before = content(out)
    again = run(config, out, batch_size=3)
    assert (again.images, again.shards, again.index, again.wrote_index) == (0, 3, out / "index.json", False)
    assert content(out) == before


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_ranks_share_the_shards_and_the_last_one_writes_the_index(
    config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, order: tuple[int, ...]
) -> None:
    run(config, tmp_path / "one")
    out = tmp_path / "many"
    for number, rank in enumerate(order):
        as_rank(monkeypatch, rank, 3)
        done = run(config, out)
        assert done.images == (3 if rank == 2 else 4)
        assert done.wrote_index == (number == 2)
    assert content(out) == content(tmp_path / "one")


def test_more_ranks_than_shards(config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    as_rank(monkeypatch, 7, 8)
    done = run(config, tmp_path / "latents")
    assert (done.images, done.shards, done.index) == (0, 0, None)


@pytest.mark.parametrize(
    ("rank", "world", "message"),
    [
        ("x", "2", "^RANK: got 'x', expected a number"),
        ("0", "-1", "^WORLD_SIZE: got '-1', expected a number"),
        ("2", "2", "^RANK: got 2, expected a number below WORLD_SIZE=2"),
    ],
)
def test_an_environment_that_makes_no_sense(
    config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: str, world: str, message: str
) -> None:
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", world)
    with pytest.raises(UserError, match=message):
        run(config, tmp_path / "latents")


@pytest.mark.parametrize("batches", range(7))
def test_stopped_anywhere_and_gone_on_gives_the_same_bytes(
    config: DataConfig, tmp_path: Path, batches: int
) -> None:
    run(config, tmp_path / "one")
    asked: list[None] = []
    out = tmp_path / "two"
    done = run(config, out, stopped=lambda: asked.append(None) or len(asked) > batches)  # type: ignore[func-returns-value]
    assert done.stopped
    assert done.shards == batches // 2
    assert (done.index is None) == (batches < 6)
    run(config, out)
    assert content(out) == content(tmp_path / "one")


def test_leftovers_of_a_killed_run_go_and_missing_shards_come_back(
    config: DataConfig, tmp_path: Path
) -> None:
    out = tmp_path / "latents"
    run(config, out)
    before = content(out)
    for name in (".shard-00001.safetensors.0a1b2c3d.partial", ".index.json.00ff00ff.partial"):
        (out / name).write_bytes(b"torn")
    (out / "shard-00000.json").unlink()
    (out / "shard-00001.safetensors").write_bytes(before["shard-00001.safetensors"][:-5])
    (out / "shard-00002.json").write_bytes(before["shard-00002.json"][:50])
    (out / "index.json").write_bytes(before["index.json"][:500])
    done = run(config, out)
    assert done.images == 11
    assert content(out) == before


def test_a_rank_leaves_the_work_of_others_alone(
    config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "latents"
    out.mkdir()
    for name in (".shard-00000.safetensors.0a1b2c3d.partial", ".index.json.00ff00ff.partial"):
        (out / name).write_bytes(b"in work")
    as_rank(monkeypatch, 1, 2)
    run(config, out)
    assert {".shard-00000.safetensors.0a1b2c3d.partial", ".index.json.00ff00ff.partial"} <= set(content(out))


def test_other_settings_or_images_need_another_folder(config: DataConfig, tmp_path: Path) -> None:
    out = tmp_path / "latents"
    run(config, out)
    before = content(out)
    other = str(save_tiny_vae(tmp_path / "other", seed=1))
    for change, options, message in (
        ({"image_size": 8}, {}, "--image-size 16, now it is 8"),
        ({"vae": other}, {}, "--vae: weights with SHA-256 .*, now it is"),
        ({}, {"shard_size": 5}, "--shard-size 4, now it is 5"),
        ({}, {"dtype": "float16"}, "--dtype float32, now it is float16"),
        ({}, {"vae_dtype": "bfloat16"}, "--vae-dtype float32, now it is bfloat16"),
        ({}, {"mirror": False}, "mirrored True, now it is False"),
    ):
        with pytest.raises(UserError, match=f"out: '.*latents' was begun with .*: {message}.*; encode into"):
            run(replace(config, **change), out, **options)
    photo = Path(config.source) / "0" / "00.png"
    moved = Path(shutil.move(photo, tmp_path / "00.png"))
    with pytest.raises(UserError, match="the source had 11 images, now it has 10"):
        run(config, out)
    Image.new("RGB", (9, 9)).save(photo)
    with pytest.raises(UserError, match="the source has changed since"):
        run(config, out)
    photo.unlink()
    shutil.copy(moved, photo.with_name("00a.png"))
    with pytest.raises(UserError, match="the source has changed since"):
        run(config, out)
    assert content(out) == before


def test_other_settings_in_the_folder_meanwhile_are_not_signed(
    config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 0 begins with another dtype after rank 1 has checked the folder, and is done before it."""
    out = tmp_path / "latents"
    asked: list[None] = []

    def others_go_first() -> bool:
        if not asked:
            asked.append(None)
            as_rank(monkeypatch, 0, 2)
            assert run(config, out, dtype="float16").shards == 2
        return False

    as_rank(monkeypatch, 1, 2)
    with pytest.raises(UserError, match=r"begun with .*: --dtype float16, now it is float32; encode into"):
        run(config, out, stopped=others_go_first)
    assert not (out / "index.json").exists()


def test_the_same_autoencoder_elsewhere_may_go_on(config: DataConfig, tiny_vae: Path, tmp_path: Path) -> None:
    out = tmp_path / "latents"
    run(config, out)
    copy = shutil.copytree(tiny_vae, tmp_path / "copy")
    assert run(replace(config, vae=str(copy)), out).images == 0
    assert LatentSet(out).autoencoder == str(copy)


def test_an_unreadable_image_stops_or_is_left_out(config: DataConfig, tmp_path: Path) -> None:
    run(config, tmp_path / "whole")
    bad = Path(config.source) / "0" / "04.png"
    bad.write_bytes(b"no image")
    out = tmp_path / "latents"
    with pytest.raises(UserError, match=r"cannot read image '.*04\.png': .*; --on-unreadable skip leaves"):
        run(config, out)
    done = run(replace(config, on_unreadable="skip"), out)
    assert (done.dropped, done.index) == (1, out / "index.json")
    latents, whole = LatentSet(out), LatentSet(tmp_path / "whole")
    assert latents.dropped == ("0/04.png",)
    kept = [index for index in range(11) if index != 2]  # 0/04.png is the third in order
    np.testing.assert_array_equal(latents.labels, whole.labels[kept])
    for row, index in enumerate(kept):
        for mirror in (False, True):
            expected = whole.load(index, random.Random(0), mirror)
            np.testing.assert_allclose(
                latents.load(row, random.Random(0), mirror), expected, atol=2e-6, rtol=2e-6
            )


def test_a_shard_may_be_empty_but_not_the_set(config: DataConfig, tmp_path: Path) -> None:
    photos = sorted(Path(config.source).rglob("*.png"))
    skipping = replace(config, on_unreadable="skip")
    for photo in photos[4:8]:
        photo.write_bytes(b"")
    run(skipping, tmp_path / "latents")
    latents = LatentSet(tmp_path / "latents")
    assert [shard.samples for shard in latents.shards] == [4, 0, 3]
    assert latents.labels.tolist() == open_images(config).labels[[0, 1, 2, 3, 8, 9, 10]].tolist()
    latents.load(4, random.Random(0))
    for photo in photos:
        photo.write_bytes(b"")
    with pytest.raises(UserError, match="none of its 11 images can be read"):
        run(skipping, tmp_path / "none")


def test_a_full_disk_keeps_what_is_complete(config: DataConfig, tmp_path: Path) -> None:
    """A limit on file sizes stands in for a full disk: the second shard is larger than the first."""
    out = tmp_path / "latents"
    photos = sorted(Path(config.source).rglob("*.png"))
    photos[0].write_bytes(b"")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    rows = 4 * 8 * 8 * 8 * 4  # bytes of the moments of four images
    resource.setrlimit(resource.RLIMIT_FSIZE, (2 * rows, hard))
    try:
        with pytest.raises(
            UserError, match=r"cannot write '.*shard-00001.safetensors': .*; complete shards stay"
        ):
            run(replace(config, on_unreadable="skip"), out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert set(content(out)) == {"shard-00000.json", "shard-00000.safetensors"}
    assert run(replace(config, on_unreadable="skip"), out).images == 7


def test_a_webdataset_gives_the_latents_of_the_folder(config: DataConfig, tmp_path: Path) -> None:
    photos = sorted(Path(config.source).rglob("*.png"))
    (tmp_path / "shards").mkdir()
    for number, span in enumerate((photos[:5], photos[5:])):
        with tarfile.open(tmp_path / "shards" / f"{number}.tar", "w") as tar:
            for photo in span:
                tar.add(photo, photo.name)
                label = tarfile.TarInfo(f"{photo.stem}.cls")
                label.size = 1
                tar.addfile(label, io.BytesIO(photo.parent.name.encode()))
    run(config, tmp_path / "of folder")
    run(replace(config, source=str(tmp_path / "shards")), tmp_path / "of shards")
    folder, shards = content(tmp_path / "of folder"), content(tmp_path / "of shards")
    assert [name for name in folder if folder[name] != shards[name] and name.endswith(".safetensors")] == []


def test_what_does_not_fit_is_named(config: DataConfig, tmp_path: Path) -> None:
    out = tmp_path / "latents"
    full = tmp_path / "full"
    full.mkdir()
    (full / "thesis.txt").touch()
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "index.json").write_text("{}")
    (tmp_path / "tars").mkdir()
    (tmp_path / "tars" / "shard-00000.tar").touch()
    wide = str(save_tiny_vae(tmp_path / "wide", in_channels=4))
    run(config, tmp_path / "encoded")
    for change, options, target, message in (
        ({}, {"batch_size": 0}, out, "--batch-size: got 0, expected 1 or more"),
        ({}, {"shard_size": -1}, out, "--shard-size: got -1, expected 1 or more"),
        ({"workers": 0}, {}, out, "workers: got 0, expected 1 or more"),
        ({"vae": None}, {}, out, "vae: the folder or hub name of an AutoencoderKL is needed"),
        ({"image_size": 17}, {}, out, "image_size: got 17, expected a multiple of 2"),
        ({"image_size": 0}, {}, out, "image_size: got 0, expected a multiple of 2"),
        ({"crop": "random"}, {}, out, "crop: encoding needs center crops, got 'random'"),
        ({"vae": wide}, {}, out, "vae: '.*wide' takes images with 4 channels, not 1 or 3"),
        ({"source": ""}, {}, out, "no images given"),
        ({"source": str(tmp_path / "nowhere")}, {}, out, "no folder '.*nowhere'"),
        ({"source": str(tmp_path / "encoded")}, {}, out, "SOURCE: '.*encoded' is already encoded"),
        ({}, {}, Path(config.source), "out: '.*photos' is the source itself"),
        ({}, {}, full, "out: '.*full' holds other files, such as 'thesis.txt'"),
        ({}, {}, full / "thesis.txt", "out: cannot write in '.*thesis.txt': File exists"),
        ({}, {}, tmp_path / "tars", "out: '.*tars' holds other files, such as 'shard-00000.tar'"),
        ({}, {}, tmp_path / "foreign", "out: '.*foreign' holds other files, such as 'index.json'"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            run(replace(config, **change), target, **options)
        assert "\n" not in str(caught.value)
    assert not out.exists() or not os.listdir(out)
    assert isinstance(open_images(replace(config, source=str(tmp_path / "encoded"))), LatentSet)


@pytest.mark.parametrize("image_size", [2**26, 2**62])
def test_a_shard_larger_than_the_memory_is_named(config: DataConfig, tmp_path: Path, image_size: int) -> None:
    with pytest.raises(UserError, match=r"^--shard-size: got 4, expected fewer: the moments of 4 images"):
        run(replace(config, image_size=image_size), tmp_path / "latents")


def test_moments_that_are_not_finite_are_named(config: DataConfig, tiny_vae: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(tiny_vae, tmp_path / "vae"))
    weights = load_file(folder / "diffusion_pytorch_model.safetensors")
    weights["quant_conv.bias"][0] = 1e5  # beyond float16
    save_file(weights, folder / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    run(replace(config, vae=str(folder)), tmp_path / "single")
    with pytest.raises(UserError, match=r"the moments of '0/00\.png' are not finite in float16"):
        run(replace(config, vae=str(folder)), tmp_path / "half", dtype="float16")
