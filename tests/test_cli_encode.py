"""``mdt-fast encode`` as a person uses it: processes, kills, signals, and every mistake in one line."""

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from forked import Forked
from mdt_fast.cli import main
from mdt_fast.data import LatentSet

SMALL = ["--image-size=16", "--batch-size=2", "--shard-size=4", "--device=cpu", "--threads=1"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hundred images in two classes: 25 shards of four."""
    root = tmp_path_factory.mktemp("photos")
    for index in range(100):
        pixels = np.random.default_rng(index).integers(0, 256, (20, 18, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / f"{'cat' if index % 3 else 'dog'}_{index:02}.png")
    return root


@pytest.fixture(scope="module")
def encoded(photos: Path, tiny_vae: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("encoded") / "latents"
    assert main(["encode", str(photos), f"--vae={tiny_vae}", f"--out={out}", *SMALL]) == 0
    return out


def start(photos: Path, vae: Path, out: Path, **environment: str) -> Forked:
    arguments = ["encode", str(photos), f"--vae={vae}", f"--out={out}", *SMALL]
    printed = (out.with_name(f"{out.name}.{environment.get('RANK', 0)}.{kind}") for kind in ("out", "err"))
    return Forked(arguments, *printed, environment)


def finish(process: Forked) -> tuple[int, str, str]:
    return process.wait(120), *process.printed()


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def wait_for(path: Path, process: Forked) -> None:
    while not path.exists():
        assert process.poll() is None, process.printed()[1]
        time.sleep(0.001)


def error(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that ``mdt-fast encode ARGUMENTS`` ends with."""
    capsys.readouterr()
    assert main(["encode", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("mdt-fast: error: ")
    assert captured.err.count("\n") == 1
    return captured.err.removeprefix("mdt-fast: error: ").rstrip("\n")


def test_it_says_how_far_and_how_it_ended(
    photos: Path, tiny_vae: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "latents"
    assert main(["encode", str(photos), f"--vae={tiny_vae}", f"--out={out}", *SMALL]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"encoding: 100/100  [\d.]+ images/s  0:00 left", lines[-2])
    assert re.fullmatch(
        r"100 images encoded in [\d.]+ s, [\d.]+ images/s; .*latents is complete: 25 shards", lines[-1]
    )
    latents = LatentSet(out)
    assert latents.classes == ("cat", "dog")
    assert np.bincount(latents.labels).tolist() == [66, 34]


@pytest.mark.slow
def test_two_processes_give_what_one_gives(
    photos: Path, tiny_vae: Path, encoded: Path, tmp_path: Path
) -> None:
    out = tmp_path / "latents"
    ranks = [start(photos, tiny_vae, out, RANK=str(rank), WORLD_SIZE="2") for rank in (0, 1)]
    ended = [finish(process) for process in ranks]
    assert [code for code, _, _ in ended] == [0, 0], ended
    assert "encoding, rank 0 of 2: 52/52" in ended[0][1]
    assert "encoding" not in ended[1][1]
    assert any("is complete: 25 shards" in text for _, text, _ in ended)
    assert content(out) == content(encoded)


@pytest.mark.slow
def test_a_killed_run_goes_on_and_gives_the_same_bytes(
    photos: Path, tiny_vae: Path, encoded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "latents"
    for shard in (0, 3):
        process = start(photos, tiny_vae, out)
        wait_for(out / f"shard-{shard:05d}.json", process)
        process.kill()
        assert finish(process)[0] == -signal.SIGKILL
    assert not (out / "index.json").exists()
    assert "index.json: missing, encoding is not finished" in error(capsys, f"--out={out}", "--verify")
    assert main(["encode", str(photos), f"--vae={tiny_vae}", f"--out={out}", *SMALL]) == 0
    assert content(out) == content(encoded)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_a_signal_ends_it_with_whole_shards(
    photos: Path, tiny_vae: Path, encoded: Path, tmp_path: Path, number: signal.Signals
) -> None:
    out = tmp_path / "latents"
    process = start(photos, tiny_vae, out)
    wait_for(out / "shard-00000.json", process)
    process.send_signal(number)
    code, text, err = finish(process)
    assert code == 128 + number, err
    last = text.splitlines()[-1]
    assert re.fullmatch(
        r"stopped; \d+ of 25 shards are complete in .*latents; resume with the same command", last
    )
    assert not [name for name in content(out) if name.startswith(".")]
    assert all(content(encoded)[name] == value for name, value in content(out).items())


def test_verify(
    photos: Path, encoded: Path, tiny_vae: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["encode", f"--out={encoded}", "--verify"]) == 0
    assert "latents: 100 images in 25 shards, all intact\n" in capsys.readouterr().out
    assert main(["encode", str(photos), f"--out={encoded}", "--verify"]) == 0
    assert f"all intact, from the images in {photos}" in capsys.readouterr().out
    for name, value in content(encoded).items():
        (tmp_path / "copy").mkdir(exist_ok=True)
        (tmp_path / "copy" / name).write_bytes(value)
    shard = tmp_path / "copy" / "shard-00004.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    assert "1 of 25 shards do not match their SHA-256" in error(
        capsys, f"--out={tmp_path / 'copy'}", "--verify"
    )
    (tmp_path / "others").mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "others" / "a_1.png")
    message = error(capsys, str(tmp_path / "others"), f"--out={encoded}", "--verify")
    assert re.search("SOURCE: '.*others' has changed since .*: it had 100 images, now it has 1", message)


def test_mistakes_are_one_line(
    photos: Path, tiny_vae: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = [
        str(photos),
        f"--vae={tiny_vae}",
        f"--out={tmp_path / 'latents'}",
        "--image-size=16",
        "--device=cpu",
    ]
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    for arguments, message in (
        (good[:2], "the following arguments are required: --out"),
        (good[1:], "encode: SOURCE is needed"),
        ([good[0], *good[2:]], "encode: --vae is needed"),
        (good[:3], "encode: --image-size is needed"),
        ([*good, "--out="], "--out: got '', expected a name"),
        ([*good, "--image-size=15"], "--image-size: got 15, expected a multiple of 2"),
        ([*good, "--batch-size=0"], "--batch-size: got 0, expected 1 or more"),
        ([*good, "--threads=0"], "--threads: got 0, expected 1 to 1024"),
        ([*good, "--dtype=float61"], "--dtype: got 'float61' (did you mean 'float16'?)"),
        ([*good, "--crop=random"], "--crop: got 'random', expected center"),
        ([*good, "--shardsize=8"], "unknown argument '--shardsize' (did you mean '--shard-size'?)"),
        ([*good, "--device=tpu9"], "--device: got 'tpu9', expected auto, cpu, cuda or cuda:N"),
        ([*good, f"--vae={tmp_path}"], "vae: no autoencoder in"),
        ([str(tmp_path / "nowhere"), *good[1:]], "data.source: no folder"),
        ([str(loop), *good[1:]], "data.source: no folder"),
        ([*good, f"--out={loop}"], "--out: cannot write in"),
        ([f"--out={tmp_path / 'nowhere'}", "--verify"], "index.json: missing"),
    ):
        assert message in error(capsys, *arguments)
    assert not (tmp_path / "latents").exists()


def test_latents_in_a_folder_named_digits_change_nothing_for_the_digits(
    tiny_vae: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    train = ["train", "--preset=digits", "--out=run", "--device=cpu", "--dry-run"]
    assert main(train) == 0
    before = capsys.readouterr().out
    options = ["--image-size=8", "--shard-size=1000", "--device=cpu", "--threads=1", "--no-mirror"]
    assert main(["encode", "digits", f"--vae={tiny_vae}", "--out=digits", *options]) == 0
    capsys.readouterr()
    assert main(train) == 0
    assert capsys.readouterr().out == before


def test_help_needs_no_torch() -> None:
    code = (
        "import sys; from mdt_fast.cli import main\n"
        "try: main(['encode', '--help'])\n"
        "finally: assert 'torch' not in sys.modules"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "torchrun --nproc-per-node 8 -m mdt_fast encode" in result.stdout
