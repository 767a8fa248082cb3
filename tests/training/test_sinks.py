"""What TensorBoard reads back, what wandb is sent (by a small stand-in for it), and failing sinks."""

import json
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mdt_fast.errors import UserError
from mdt_fast.training.sinks import Sinks, TensorBoardSink, WandbSink, open_sinks, scalars
from tiny import tiny

ROW = {
    "step": 20, "loss": 0.5, "mse": 0.4, "vb": 0.1, "m_loss": 0.6, "m_mse": 0.45, "m_vb": 0.15,
    "loss_q0": 0.9, "loss_q3": 0.1, "m_vb_q2": 0.25, "grad_norm": 1.5, "lr": 3e-4, "img_per_s": 812.0,
    "tflop_per_s": 61.0, "share_of_peak": 0.2, "memory_gib": 7.5, "skipped": 1, "epoch": 0.25,
    "time": 1.75e9,
}  # fmt: skip
TAGS = {
    "loss/full": 0.5, "mse/full": 0.4, "vb/full": 0.1, "loss/masked": 0.6, "mse/masked": 0.45,
    "vb/masked": 0.15, "loss_q0/full": 0.9, "loss_q3/full": 0.1, "vb_q2/masked": 0.25,
    "train/grad_norm": 1.5, "train/lr": 3e-4, "train/skipped": 1.0, "train/epoch": 0.25,
    "speed/img_per_s": 812.0, "speed/tflop_per_s": 61.0, "speed/share_of_peak": 0.2,
    "speed/memory_gib": 7.5,
}  # fmt: skip


def row(step: int, loss: float) -> dict[str, Any]:
    return {"step": step, "loss": loss, "time": 1.75e9 + step}


def written(folder: Path) -> Any:
    """What TensorBoard itself reads from the event files in ``folder``."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(folder)).Reload()


def picture(path: Path, color: tuple[int, int, int] = (200, 10, 30)) -> Path:
    Image.new("RGB", (6, 4), color).save(path)
    return path


def test_tags_of_a_row() -> None:
    assert scalars(ROW) == TAGS


def test_what_is_no_finite_number_has_no_tag() -> None:
    odd = {"step": 1, "loss": float("nan"), "lr": None, "note": "x", "grad_norm": 2}
    assert scalars(odd) == {"train/grad_norm": 2.0}


def test_tensorboard_shows_scalars_and_pictures(tmp_path: Path) -> None:
    sink = TensorBoardSink(tmp_path / "events")
    sink.write(ROW)
    sink.picture("samples", picture(tmp_path / "a.png"), 20)
    sink.close()
    shown = written(tmp_path / "events")
    assert set(shown.Tags()["scalars"]) == set(TAGS)
    for tag, value in TAGS.items():
        (event,) = shown.Scalars(tag)
        assert (event.step, event.wall_time) == (20, 1.75e9)
        assert event.value == pytest.approx(value, rel=1e-6)
    (image,) = shown.Images("samples")
    assert (image.step, image.width, image.height) == (20, 6, 4)
    shown_png = tmp_path / "shown.png"
    shown_png.write_bytes(image.encoded_image_string)
    assert np.array_equal(np.asarray(Image.open(shown_png)), np.full((4, 6, 3), (200, 10, 30)))


def test_tensorboard_forgets_what_a_run_goes_back_over(tmp_path: Path) -> None:
    config = tiny()
    (before,) = open_sinks(tmp_path, config, 0)
    for step in (10, 20, 30):
        before.write(row(step, 1.0))
    before.close()
    time.sleep(1.1)  # files are read in the order of their names, which hold the second of their start
    (after,) = open_sinks(tmp_path, config, 20)  # the checkpoint of step 20; the row of step 30 was lost
    after.write(row(25, 2.0))
    after.close()
    assert [(e.step, e.value) for e in written(tmp_path / "tensorboard").Scalars("loss/full")] == [
        (10, 1.0), (20, 1.0), (25, 2.0),
    ]  # fmt: skip


def test_tensorboard_without_tensorflow() -> None:
    code = "import sys, torch.utils.tensorboard; print('tensorflow' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_importing_sinks_loads_neither() -> None:
    code = "import sys, mdt_fast.training.sinks; print({'tensorboard', 'wandb'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_tensorboard_is_used_where_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert open_sinks(tmp_path, tiny(), 0, tensorboard=False) == []
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # as if not installed
    assert open_sinks(tmp_path, tiny(), 0) == []
    with pytest.raises(UserError, match=r"^tensorboard: cannot be imported .*mdt-fast\[watch\]'$"):
        open_sinks(tmp_path, tiny(), 0, tensorboard=True)


FULL_DISK = """
import json, resource, sys
from pathlib import Path
from mdt_fast.training.sinks import Sinks, TensorBoardSink

said = []
sinks = Sinks([TensorBoardSink(Path(sys.argv[1]))], said.append)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))  # files may grow no further
for step in range(1, 400):
    sinks.write({"step": step, "loss": 1.0})
sinks.close()
sinks.write({"step": 400, "loss": 1.0})
sinks.close()
print(json.dumps(said))
"""


def test_a_full_disk_is_said_once(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    (said,) = json.loads(done.stdout.splitlines()[-1])
    assert said.startswith("warning: TensorBoard failed and is off for this run: OSError: ")
    assert "\n" not in said


class FakeRun:
    def __init__(self, calls: list[Any]):
        self.calls, self.logged, self.finished = calls, [], False

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        self.calls.append((name, step_metric))

    def log(self, values: dict[str, Any]) -> None:
        self.logged.append(values)

    def finish(self) -> None:
        self.finished = True


class FakeWandb(types.ModuleType):
    """The part of wandb that a sink uses; ``fails`` is raised by ``init``."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.calls: list[Any] = []
        self.inits: list[dict[str, Any]] = []
        self.runs: list[FakeRun] = []
        self.fails: Exception | None = None

    def init(self, **kwargs: Any) -> FakeRun:
        self.inits.append(kwargs)
        if self.fails:
            raise self.fails
        self.runs.append(FakeRun(self.calls))
        return self.runs[-1]

    def Image(self, path: str) -> tuple[str, str]:
        return ("image", path)


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> FakeWandb:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def test_wandb_gets_rows_and_pictures(tmp_path: Path, wandb: FakeWandb) -> None:
    out = tmp_path / "my-run"
    out.mkdir()
    (sink,) = open_sinks(out, tiny(), 0, tensorboard=False, wandb="mdt")
    (made,) = wandb.inits
    assert (made["project"], made["name"], made["resume"], made["dir"]) == (
        "mdt", "my-run", "allow", str(out),
    )  # fmt: skip
    assert made["config"]["train"]["batch_size"] == 4
    sink.write(ROW)
    sink.picture("samples", out / "a.png", 20)
    sink.close()
    assert wandb.runs[0].logged == [
        {**TAGS, "step": 20},
        {"samples": ("image", str(out / "a.png")), "step": 20},
    ]
    assert wandb.runs[0].finished
    assert wandb.calls == [("step", None), ("*", "step")]


def test_a_resumed_run_goes_on_in_the_same_wandb_run(tmp_path: Path, wandb: FakeWandb) -> None:
    for _ in range(3):
        WandbSink(tmp_path, "mdt", "run", {}).close()
    assert len({made["id"] for made in wandb.inits}) == 1
    other = tmp_path / "other"
    other.mkdir()
    WandbSink(other, "mdt", "run", {}).close()
    assert len({made["id"] for made in wandb.inits}) == 2


def test_wandb_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"^wandb: cannot be imported .*pip install wandb$"):
        open_sinks(tmp_path, tiny(), 0, wandb="mdt")


def test_a_folder_named_wandb_is_not_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "wandb").mkdir()
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UserError, match="pip install wandb"):
        WandbSink(tmp_path, "mdt", "run", {})
    monkeypatch.delitem(sys.modules, "wandb", raising=False)


def test_a_new_run_that_wandb_refuses_ends_at_once(tmp_path: Path, wandb: FakeWandb) -> None:
    wandb.fails = RuntimeError("api_key not configured\n(no-tty)")
    with pytest.raises(
        UserError, match=r"^wandb: .* 'mdt': RuntimeError: api_key not configured \(no-tty\)$"
    ):
        WandbSink(tmp_path, "mdt", "run", {})
    wandb.fails = None
    WandbSink(tmp_path, "mdt", "run", {})
    assert wandb.inits[0]["id"] != wandb.inits[1]["id"]  # nothing of the first was kept


def test_a_resumed_run_trains_on_without_wandb(tmp_path: Path, wandb: FakeWandb) -> None:
    WandbSink(tmp_path, "mdt", "run", {}).close()
    wandb.fails = ConnectionError("no network")
    said: list[str] = []
    sinks = Sinks([WandbSink(tmp_path, "mdt", "run", {})], said.append)
    for step in (1, 2):
        sinks.write(row(step, 1.0))
    sinks.close()
    assert said == ["warning: wandb failed and is off for this run: ConnectionError: no network"]


def test_an_edited_id_is_refused(tmp_path: Path, wandb: FakeWandb) -> None:
    (tmp_path / "wandb_id").write_text("../elsewhere?\n")
    with pytest.raises(UserError, match="holds no wandb run id"):
        WandbSink(tmp_path, "mdt", "run", {})
    assert not wandb.inits


class Recorder:
    def __init__(self, name: str, fails_at: str = ""):
        self.name, self.fails_at, self.got = name, fails_at, []

    def _take(self, what: str) -> None:
        self.got.append(what)
        if what == self.fails_at:
            raise RuntimeError("gone\nfor good")

    def write(self, row: dict[str, Any]) -> None:
        self._take(f"write {row['step']}")

    def picture(self, name: str, path: Path, step: int) -> None:
        self._take(f"picture {step}")

    def close(self) -> None:
        self._take("close")


@pytest.mark.parametrize("fails_at", ["write 1", "write 2", "picture 2", "close"])
def test_one_failing_sink_leaves_the_others(fails_at: str, tmp_path: Path) -> None:
    said: list[str] = []
    good, bad = Recorder("good"), Recorder("bad", fails_at)
    sinks = Sinks([bad, good], said.append)
    sinks.write(row(1, 1.0))
    sinks.write(row(2, 1.0))
    sinks.picture("samples", tmp_path / "a.png", 2)
    sinks.close()
    everything = ["write 1", "write 2", "picture 2", "close"]
    assert good.got == everything
    assert bad.got == everything[: everything.index(fails_at) + 1]
    assert said == ["warning: bad failed and is off for this run: RuntimeError: gone for good"]
