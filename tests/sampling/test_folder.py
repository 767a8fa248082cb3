"""Folders of many samples: resumed, shared by processes, and never a mix of two kinds."""

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from forked import Forked
from mdt_fast.cli import main
from mdt_fast.errors import UserError
from mdt_fast.sampling import SampleFolder, save_npz, shown
from tiny import ARGUMENTS

LABELS = [0, 1, 2, 0, 1, 2, 0]
SETTINGS = {"checkpoint": "step 4", "--cfg-scale": 2.0, "--cfg-interval": (0.0, 0.5)}


def filled(root: Path, **changes: object) -> SampleFolder:
    folder = SampleFolder(root, {**SETTINGS, **changes}, LABELS, 3)
    folder.prepare()
    return folder


def pictures(folder: SampleFolder, shard: int) -> np.ndarray:
    span = folder.span(shard)
    return np.random.default_rng(shard).integers(0, 256, (len(span), 4, 4, 3), dtype=np.uint8)


def test_shards_become_one_file(tmp_path: Path) -> None:
    folder = filled(tmp_path / "out")
    assert (folder.shards, folder.missing(), folder.missing(1, 2)) == (3, [0, 1, 2], [1])
    for shard in (2, 0, 1):
        assert not folder.complete
        folder.write(shard, pictures(folder, shard))
    again = filled(tmp_path / "out")
    assert again.complete
    assert again.missing() == []
    path = again.assemble()
    assert path.name == "samples_7x4x4x3.npz"
    whole = np.concatenate([pictures(folder, shard) for shard in range(3)])
    with np.load(path, allow_pickle=False) as saved:
        assert saved.files == ["arr_0", "arr_1"]
        np.testing.assert_array_equal(saved["arr_0"], whole)
        assert saved["arr_1"].tolist() == LABELS
    np.testing.assert_array_equal(again.pick([1, 3, 6]), whole[[1, 3, 6]])
    first = path.read_bytes()
    path.unlink()
    assert again.assemble().read_bytes() == first
    assert filled(tmp_path / "out").assemble() == path


def test_other_settings_and_files_are_refused_by_name(tmp_path: Path) -> None:
    filled(tmp_path / "out")
    with pytest.raises(UserError, match=r"was begun with --cfg-scale 2.0, now it is 3.0"):
        filled(tmp_path / "out", **{"--cfg-scale": 3.0})
    with pytest.raises(UserError, match=r"was begun with checkpoint \"step 4\", now it is \"step 8\""):
        filled(tmp_path / "out", checkpoint="step 8")
    with pytest.raises(UserError, match=r"was begun without --new, now it is 1"):
        filled(tmp_path / "out", **{"--new": 1})
    (tmp_path / "out" / "settings.json").write_text("{")
    with pytest.raises(UserError, match="truncated or edited"):
        filled(tmp_path / "out")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "photo.png").touch()
    with pytest.raises(UserError, match=r"holds other files, such as 'photo.png'"):
        filled(tmp_path / "mine")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write in"):
        filled(tmp_path / "file")


@pytest.mark.parametrize("damage", ["truncated", "flipped", "of another folder", "header", "compression"])
def test_a_damaged_shard_is_named(tmp_path: Path, damage: str) -> None:
    folder = filled(tmp_path / "out")
    for shard in range(3):
        folder.write(shard, pictures(folder, shard))
    path = tmp_path / "out" / "shard-00001.npz"
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:100])
    elif damage == "flipped":
        data = bytearray(path.read_bytes())
        data[200] ^= 1
        path.write_bytes(data)
    elif damage == "header":
        # Too large for NumPy to check the CRC first.
        save_npz(path, np.zeros((2, 64, 64, 3), np.uint8), [0, 0])
        path.write_bytes(path.read_bytes().replace(b"}", b" ", 1))
    elif damage == "compression":
        data = bytearray(path.read_bytes())
        data[data.index(b"PK\1\2") + 10] = 77
        path.write_bytes(data)
    else:
        path.write_bytes((tmp_path / "out" / "shard-00002.npz").read_bytes())
    with pytest.raises(
        UserError, match=r"shard-00001.npz: damaged since it was written; remove it and resume"
    ):
        folder.assemble()
    assert not list((tmp_path / "out").glob("*samples*"))
    path.unlink()
    assert folder.missing() == [1]


def test_a_grid_needs_the_first_images_of_the_first_classes() -> None:
    labels = [i % 30 for i in range(1200)]
    chosen = shown(labels)
    assert len(chosen) == 24 * 20
    assert max(labels[i] for i in chosen) == 23
    assert max(chosen) < 600


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("folder") / "run"
    options = ["--batch-size=4", "--device=cpu", "--steps=2", "--save-every=1", "--set=sample.steps=3"]
    assert main(["train", "--preset=digits", *ARGUMENTS, *options, f"--out={run}"]) == 0
    return run


def options(run: Path, out: Path, *more: str) -> list[str]:
    settings = ["--num-samples=13", "--shard-size=4", "--batch-size=3", "--steps=3", "--sampler=ddpm"]
    return ["sample", str(run), f"--out={out}", "--device=cpu", *settings, *more]


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_resumed_and_shared_it_is_the_same_to_the_bit(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(options(trained, tmp_path / "alone", f"--grid={tmp_path / 'a.png'}")) == 0
    whole = content(tmp_path / "alone")
    shards = [f"shard-0000{i}.npz" for i in range(4)]
    assert sorted(whole) == ["samples_13x8x8x1.npz", "settings.json", *shards]
    at_once = [word for word in options(trained, tmp_path) if not word.startswith(("--out", "--shard"))]
    assert main([*at_once, f"--npz={tmp_path / 'x.npz'}", f"--grid={tmp_path / 'b.png'}"]) == 0
    with np.load(tmp_path / "x.npz") as one, np.load(tmp_path / "alone" / "samples_13x8x8x1.npz") as other:
        assert np.abs(one["arr_0"].astype(int) - other["arr_0"]).max() <= 1  # other batches, other rounding
        assert one["arr_1"].tolist() == other["arr_1"].tolist()
    assert Image.open(tmp_path / "a.png").size == Image.open(tmp_path / "b.png").size

    # Some files are lost, and a killed process has left one.
    for name in ("shard-00001.npz", "samples_13x8x8x1.npz"):
        (tmp_path / "alone" / name).unlink()
    (tmp_path / "alone" / ".shard-00001.npz.0123abcd.partial").touch()
    capsys.readouterr()
    assert main(options(trained, tmp_path / "alone")) == 0
    assert "sampling: 4/4" in capsys.readouterr().out.replace("  ", " ")
    assert content(tmp_path / "alone") == whole

    # Two processes, one after the other; the last one joins the shards.
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        assert main(options(trained, tmp_path / "shared", f"--png={tmp_path / 'png'}")) == 0
        assert (tmp_path / "shared" / "samples_13x8x8x1.npz").exists() == (rank == "0")
    assert content(tmp_path / "shared") == whole
    assert len(list((tmp_path / "png").iterdir())) == 13
    with np.load(tmp_path / "shared" / "samples_13x8x8x1.npz") as saved:
        picture = np.asarray(Image.open(tmp_path / "png" / "2_000012.png"))
        np.testing.assert_array_equal(picture, saved["arr_0"][12, :, :, 0])


def test_another_checkpoint_or_setting_is_refused(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(options(trained, tmp_path / "out")) == 0
    before = content(tmp_path / "out")
    first = trained / "checkpoints" / "step_0000001"
    for arguments, message in (
        (options(first, tmp_path / "out"), "was begun with checkpoint"),
        (
            options(trained, tmp_path / "out", "--cfg-scale=3"),
            "was begun with --cfg-scale 2.0, now it is 3.0",
        ),
        (options(trained, tmp_path / "out", "--labels=3"), "was begun with --labels [0, 1, 2"),
        (options(trained, trained / "checkpoints" / "new"), "checkpoints are in"),
    ):
        capsys.readouterr()
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert content(tmp_path / "out") == before
    assert main(options(trained, tmp_path / "out", "--batch-size=2")) == 0, "batches may differ"
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["sample", str(trained), f"--npz={tmp_path / 'x.npz'}"]) == 2
    assert "with several processes, which share a folder of shards" in capsys.readouterr().err


@pytest.mark.slow
def test_killed_half_way_it_goes_on(trained: Path, tmp_path: Path) -> None:
    """SIGKILL at any moment leaves whole shards; the same command then gives an unbroken run's files."""
    many = ["--num-samples=60", "--steps=20"]
    killed = Forked(options(trained, tmp_path / "killed", *many), tmp_path / "out", tmp_path / "err")
    deadline = time.monotonic() + 120
    while len(list((tmp_path / "killed").glob("shard-*.npz"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.005)
    killed.kill()
    killed.wait(60)
    left = len(list((tmp_path / "killed").glob("shard-*.npz")))
    assert 2 <= left < 15, killed.printed()
    for out in ("killed", "whole"):
        assert main(options(trained, tmp_path / out, *many)) == 0
    assert content(tmp_path / "killed") == content(tmp_path / "whole")


def test_classes_by_name(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from mdt_fast.commands.sample_request import chosen_labels

    classes = ("cat", "dog", "owl")
    assert chosen_labels(None, classes, 5) == [0, 1, 2]
    assert chosen_labels("owl, cat,4", classes, 5) == [2, 0, 4]
    with pytest.raises(UserError, match=r"--labels: 'dgo' is not a class \(did you mean 'dog'\?\)"):
        chosen_labels("cat,dgo", classes, 5)
    with pytest.raises(UserError, match=r"--labels: got 5, expected 0 to 4"):
        chosen_labels("5", classes, 5)


def test_names_with_commas_are_names() -> None:
    from mdt_fast.commands.sample_request import chosen_labels

    classes = ("cat", "zebra", "zebra, striped", "tench, Tinca tinca, fish")
    assert chosen_labels("zebra, striped", classes, 4) == [2]
    assert chosen_labels("cat,zebra, striped,zebra", classes, 4) == [0, 2, 1]
    assert chosen_labels("tench, Tinca tinca, fish,2", classes, 4) == [3, 2]
    many = [f"{i}, of {i}" for i in range(2000)]
    assert chosen_labels(",".join(many), many, 2000) == [*range(2000)]
    with pytest.raises(UserError, match="'striped' is not a class"):
        chosen_labels("striped,zebra", classes, 4)


def test_a_run_without_labels_is_not_guided(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    train = ["train", "--preset=digits", "--unconditional", *ARGUMENTS, "--batch-size=4", "--steps=1"]
    assert main([*train, "--device=cpu", "--set=sample.steps=2", f"--out={run}"]) == 0
    capsys.readouterr()
    few = ["sample", str(run), "--num-samples=2", "--steps=2", f"--npz={tmp_path / 'x.npz'}"]
    assert main([*few, "--cfg-scale=2"]) == 2
    assert "--cfg-scale: the run was trained without labels" in capsys.readouterr().err
    assert main(few) == 0


def test_a_whole_that_another_process_removes_is_no_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = SampleFolder(tmp_path, {}, [0], 1)
    folder.prepare()
    folder.write(0, np.zeros((1, 2, 2, 3), np.uint8))

    def removed(*_: Any) -> None:
        raise FileNotFoundError

    monkeypatch.setattr("mdt_fast.sampling.folder.save_npz", removed)
    with pytest.raises(UserError, match=r"cannot write .*samples_1x2x2x3.npz': another process removes it"):
        folder.assemble()
