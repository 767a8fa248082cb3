"""Checkpoints: complete or absent, refused by name when damaged, and the last good one is never lost."""

import errno
import json
import os
import re
import resource
import shutil
import tracemalloc
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import deserialize
from safetensors.torch import save_file

from mdt_fast.errors import UserError
from mdt_fast.training import checkpoint, loop, saving, train
from mdt_fast.training.checkpoint import PARTS, DamagedCheckpointError, latest, newest_good, open_checkpoint
from mdt_fast.training.distributed import World, lost_processes_named
from mdt_fast.training.saving import Saver
from tiny import file_of, files_of, tensors_of, tiny

FILES = [*map(file_of, PARTS), "state.json"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("trained") / "run"
    train(tiny(), run)
    return run


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def edit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(content)


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [truncate, edit, empty, Path.unlink])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_checkpoint_is_refused_and_the_one_before_it_works(run: Path, name: str, damage) -> None:
    newest, before = run / "checkpoints" / "step_0000008", run / "checkpoints" / "step_0000004"
    whole = tensors_of(newest)
    damage(newest / name)
    damaged = files_of(newest)
    with pytest.raises(DamagedCheckpointError) as caught:
        train(tiny(), run, resume="auto")
    message = str(caught.value)
    assert message.startswith(str(newest / name))
    assert "\n" not in message
    assert message.endswith(f"use --resume {before}")
    assert files_of(newest) == damaged, "refusing must not touch anything"
    assert newest_good(run) == before

    train(tiny(), run, resume=str(before))
    assert tensors_of(newest) == whole
    assert files_of(newest.with_name("superseded_step_0000008")) == damaged


def test_an_edited_state_is_refused(run: Path) -> None:
    file = run / "checkpoints" / "step_0000008" / "state.json"
    state = json.loads(file.read_text())
    state["step"] = 9
    file.write_text(json.dumps(state))
    with pytest.raises(DamagedCheckpointError, match=r"state.json: edited or damaged"):
        open_checkpoint(run)


def test_states_that_are_none(run: Path) -> None:
    folder = run / "checkpoints" / "step_0000008"
    file = folder / "state.json"
    state = json.loads(file.read_text())
    del state["sha256"], state["files"]
    file.write_text(json.dumps({**state, "sha256": checkpoint.sign(state)}))
    with pytest.raises(DamagedCheckpointError, match=r"state.json: edited, entries are missing"):
        open_checkpoint(run)
    file.write_text("[" * 100_000)
    with pytest.raises(DamagedCheckpointError, match=r"state.json: truncated or edited"):
        open_checkpoint(run)
    shutil.rmtree(folder)
    folder.touch()
    with pytest.raises(DamagedCheckpointError, match=r"step_0000008: not a checkpoint but a file"):
        open_checkpoint(run)


def test_a_file_that_a_trainer_deletes_while_it_is_read(run: Path) -> None:
    opened = open_checkpoint(run)
    opened.verify("ema")
    shutil.rmtree(opened.path)
    with pytest.raises(DamagedCheckpointError, match=r"ema.shard-.*: missing from its checkpoint"):
        opened.tensors("ema")


def test_a_file_that_does_not_belong_to_a_checkpoint(run: Path) -> None:
    """Every file in the folder would be read, so only those that the checkpoint lists may be there."""
    opened = open_checkpoint(run)
    shutil.copy(opened.path / file_of("model"), opened.path / "ema" / "more.safetensors")
    with pytest.raises(
        DamagedCheckpointError, match=r"ema.more.safetensors: not in the checkpoint's state.json"
    ):
        opened.tensors("ema")


def test_every_mth_is_kept(tmp_path: Path) -> None:
    train(tiny(keep=1, keep_every=4, steps=10, save_every=2), tmp_path)
    kept = [path.name for path in checkpoint.steps(tmp_path)]
    assert kept == ["step_0000004", "step_0000008", "step_0000010"]


def test_a_stager_that_works_once(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Like torch 2.11's, which can copy a dict only once: each part of each checkpoint gets its own."""

    class Once(saving.DefaultStager):
        def stage(self, *args: Any, **kwargs: Any) -> Any:
            staged = super().stage(*args, **kwargs)
            self._state_dict_stager._deepcopy_dispatch.clear()
            return staged

    monkeypatch.setattr(saving, "DefaultStager", Once)
    monkeypatch.setattr(saving, "STAGES_AGAIN", False)
    train(tiny(), tmp_path / "again")
    for step in ("step_0000004", "step_0000008"):
        assert tensors_of(tmp_path / "again" / "checkpoints" / step) == tensors_of(run / "checkpoints" / step)


def test_a_folder_that_cannot_be_written_is_named_before_training(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").touch()
    with pytest.raises(UserError, match=r"cannot write checkpoints in .*: File exists"):
        train(tiny(), tmp_path)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_partial_files_and_links_are_removed_without_following_them(run: Path, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").touch()
    (run / "checkpoints" / f"{checkpoint.PARTIAL}file").touch()
    (run / "checkpoints" / f"{checkpoint.PARTIAL}link").symlink_to(precious)
    train(tiny(steps=9), run, resume="auto")
    assert [path.name for path in (run / "checkpoints").glob(".*")] == []
    assert (precious / "file").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_not_saved(
    run: Path, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    step = loop.train_step

    def broken(training, *args) -> None:
        step(training, *args)
        next(training.model.parameters()).data.view(-1)[0] = value

    monkeypatch.setattr(loop, "train_step", broken)
    with pytest.raises(
        UserError, match=r"^the model's weights are not finite after step 9; .*the last .*step_0000008'$"
    ):
        train(tiny(steps=9), run, resume="auto")
    assert latest(run) == run / "checkpoints" / "step_0000008"


def test_what_a_kill_leaves_half_written_is_not_a_checkpoint(run: Path) -> None:
    torn = run / "checkpoints" / f"{checkpoint.PARTIAL}step_0000012"
    torn.mkdir()
    (torn / "model.safetensors").write_bytes(b"half")
    assert latest(run) == run / "checkpoints" / "step_0000008"
    train(tiny(steps=12), run, resume="auto")
    assert not torn.exists()
    assert latest(run) == run / "checkpoints" / "step_0000012"


@pytest.mark.parametrize("keep", [1, 2])
def test_old_checkpoints_are_pruned(tmp_path: Path, keep: int) -> None:
    train(tiny(keep=keep, steps=10, save_every=2), tmp_path)
    assert [path.name for path in checkpoint.steps(tmp_path)] == ["step_0000008", "step_0000010"][-keep:]


def test_a_checkpoint_is_not_put_together_in_memory(tmp_path: Path) -> None:
    """It would block all other threads, and the training would wait."""
    weights = {f"blocks.{i}.weight": torch.randn(512, 512) for i in range(16)}  # 16 MiB
    parts = {"model": weights, "ema": dict(weights), "optimizer": {"counters/skipped_steps": torch.tensor(0)}}
    saver = Saver(tmp_path, World(), keep=1, asynchronous=False)
    tracemalloc.start()
    try:
        saver.save(1, parts, {})
        assert tracemalloc.get_traced_memory()[1] < 4 * 2**20
    finally:
        tracemalloc.stop()
        saver.close()
    saved = deserialize((tmp_path / "checkpoints" / "step_0000001" / file_of("ema")).read_bytes())
    assert {name: bytes(entry["data"]) for name, entry in saved} == {
        name: weight.numpy().tobytes() for name, weight in weights.items()
    }


@dataclass
class Deserted(World):
    """Two processes, one of which is gone."""

    size: int = 2

    def all_gather_object(self, value: Any, group: Any = None) -> list[Any]:
        raise RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:5831")


def test_a_process_lost_while_saving_is_no_failure_of_the_disk(tmp_path: Path) -> None:
    world = Deserted()
    saver = Saver(tmp_path, world, keep=1)
    saver.save(1, {"model": {"weight": torch.ones(2)}}, {})
    lost = r"^another process of the run was lost \(.*closed by peer"
    with pytest.raises(UserError, match=lost), lost_processes_named(world):
        saver.wait()
    assert latest(tmp_path) is None
    saver.close()


def test_a_full_disk_loses_nothing(run: Path) -> None:
    kept = files_of(run / "checkpoints" / "step_0000008")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(
        resource.RLIMIT_FSIZE, (30_000, limits[1])
    )  # a write beyond it fails as on a full disk
    try:
        with pytest.raises(
            UserError, match=r"cannot save .*step_0000012': .*the last one is .*step_0000008'"
        ):
            train(tiny(steps=12), run, resume="auto")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert files_of(run / "checkpoints" / "step_0000008") == kept
    assert [path.name for path in (run / "checkpoints").glob(".*")] == []
    assert train(tiny(steps=12), run, resume="auto").steps == 12


def test_state_json_says_what_made_it(run: Path) -> None:
    opened = open_checkpoint(run)
    assert (opened.step, opened.classes, opened.config) == (8, tuple("0123456789"), tiny())
    assert opened.state["versions"]["torch"]
    assert set(opened.state["files"]) == set(FILES) - {"state.json"}


def test_no_run_or_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run or checkpoint at"):
        open_checkpoint(tmp_path / "nothing")
    with pytest.raises(UserError, match=r"nor a checkpoint .no checkpoints. and no state\.json"):
        open_checkpoint(tmp_path)
    weights = tmp_path / "weights.safetensors"
    weights.write_bytes(b"")
    with pytest.raises(
        UserError, match=r"but a file; if it holds weights, 'mdt-fast convert .* RUN' makes a run"
    ):
        open_checkpoint(weights)
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline" / "model_index.json").write_text("{}")
    with pytest.raises(UserError, match=r"but a pipeline: MDTPipeline\.from_pretrained reads it"):
        open_checkpoint(tmp_path / "pipeline")
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UserError, match="holds no complete checkpoint"):
        open_checkpoint(tmp_path)
    with pytest.raises(UserError, match="its run is"):
        open_checkpoint(tmp_path / "checkpoints")


def test_a_renamed_checkpoint_is_refused_and_stays_where_it_is(run: Path) -> None:
    folder = run / "checkpoints" / "step_0000008"
    folder.rename(folder.with_name("step_0000009"))
    with pytest.raises(
        DamagedCheckpointError, match=r"step_0000009: renamed, it is the checkpoint of step 8"
    ):
        train(tiny(steps=12), run, resume="auto")
    assert folder.with_name("step_0000009").is_dir()


def test_pruning_touches_older_checkpoints_of_its_own_alone(
    run: Path, tmp_path: Path, recwarn: pytest.WarningsRecorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not others' later checkpoints, links or files; and one that cannot be deleted stops no run."""
    folder, elsewhere = run / "checkpoints", tmp_path / "elsewhere"
    (folder / "step_0000004").rename(elsewhere)
    (folder / "step_0000004").symlink_to(elsewhere)
    (folder / "step_0000002").touch()
    step = loop.train_step

    def meddled(training, *args) -> None:
        step(training, *args)
        if training.step == 10:
            (folder / "step_9999999").mkdir()

    monkeypatch.setattr(loop, "train_step", meddled)
    train(tiny(steps=12, keep=1), run, resume="auto")
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["step_0000002", "step_0000004", "step_0000012", "step_9999999"]
    assert open_checkpoint(elsewhere).step == 4
    monkeypatch.setattr(saving, "delete", no_deleting)
    shutil.rmtree(folder / "step_9999999")
    train(tiny(steps=16, keep=1), run, resume="auto")
    assert latest(run) == folder / "step_0000016"
    said = " ".join(str(warning.message) for warning in recwarn)
    assert re.search(r"could not delete the old checkpoint '?\S*step_0000012'", said)


def no_deleting(path: Path) -> None:
    raise PermissionError("not permitted")


def signed(folder: Path, **changes: object) -> None:
    """Change the state of a checkpoint and correct all checksums, as somebody might by hand."""
    file = folder / "state.json"
    state = {**json.loads(file.read_text()), **changes}
    del state["sha256"]
    for name in state["files"]:
        path = folder / name
        state["files"][name] = {"bytes": path.stat().st_size, "sha256": checkpoint.sha256_of(path)}
    file.write_text(json.dumps({**state, "sha256": checkpoint.sign(state)}))


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer_groups": [{}]},
        {"optimizer_groups": []},
        {"optimizer_groups": [1]},
        {"step": True},
        {"streak": -5},
    ],
    ids=str,
)
def test_states_made_by_hand_are_refused_in_a_line(run: Path, changes: dict[str, object]) -> None:
    signed(run / "checkpoints" / "step_0000008", **changes)
    with pytest.raises(UserError, match="step_0000008") as caught:
        train(tiny(steps=12), run, resume="auto")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("part", "name", "value", "message"),
    [
        ("model", "pos_embed", torch.zeros(1, 4, 16, dtype=torch.bfloat16), "'pos_embed' is torch.bfloat16"),
        ("model", "pos_embed", torch.zeros(1, 4, 8), "'pos_embed' is torch.float32 \\[1, 4, 8\\]"),
        ("optimizer", "counters/skipped_steps", None, "no state for this optimiser"),
        ("optimizer", "pos_embed/exp_avg", None, "no state for this optimiser"),
        ("model", "mask_token", None, "lacks 'mask_token', which this model needs"),
    ],
)
def test_tensors_made_by_hand_are_refused_in_a_line(
    run: Path, part: str, name: str, value: torch.Tensor | None, message: str
) -> None:
    folder = run / "checkpoints" / "step_0000008"
    tensors = open_checkpoint(run).tensors(part)
    if value is None:
        del tensors[name]
    else:
        tensors[name] = value
    save_file(tensors, folder / file_of(part))
    signed(folder)
    with pytest.raises(UserError, match=message) as caught:
        train(tiny(steps=12), run, resume="auto")
    assert "\n" not in str(caught.value)


def test_what_cannot_be_removed_stays_and_the_run_goes_on(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For instance, a file that another program holds open on NFS."""
    leftover = run / "checkpoints" / f"{checkpoint.PARTIAL}step_0000001"
    leftover.mkdir()
    (leftover / "held").touch()
    unlink = os.unlink

    def refusing(path: Any, *args: Any, **kwargs: Any) -> None:
        if Path(path).name == "held":
            raise OSError(errno.EBUSY, "busy")
        unlink(path, *args, **kwargs)

    monkeypatch.setattr(os, "unlink", refusing)
    train(tiny(steps=9), run, resume="auto")
    assert latest(run) == run / "checkpoints" / "step_0000009"
    assert (leftover / "held").exists()
