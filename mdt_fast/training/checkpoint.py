"""Checkpoints: complete or absent, verified when read, never pickled.

A checkpoint is a folder ``checkpoints/step_0000940/`` with ``model/``, ``ema/`` and ``optimizer/``, which
torch.distributed.checkpoint writes as safetensors, one file per process, and ``state.json`` (step,
configuration, versions, and the SHA-256 of every file, itself included). It is written under a temporary
name, flushed to disk and then renamed, so a run killed at any moment leaves only complete checkpoints
(``saving.py``). When a run resumes from an earlier checkpoint, later ones are renamed, not deleted.
"""

import hashlib
import json
import os
import platform
import re
import shutil
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import safetensors
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader

from ..config import RunConfig, as_saved, from_dict
from ..errors import UserError, one_line
from ..files import dead_link, sha256_of
from ..sampling import check_name
from .distributed import World
from .optim import unripe

FORMAT = 2
STATE = "state.json"
PARTS = MODEL, EMA, OPTIMIZER = "model", "ema", "optimizer"
METRICS = "metrics"  # in the optimizer part, only if the run was saved between two rows of its metrics
NAME = re.compile(r"step_(\d{7,})")
PARTIAL = ".partial_"
UNREADABLE = (
    OSError, safetensors.SafetensorError, dcp.api.CheckpointException, KeyError, ValueError, TypeError,
    AttributeError,
)  # fmt: skip
"""Exceptions that reading hand-made files can raise."""


class DamagedCheckpointError(UserError):
    """A checkpoint is incomplete, truncated or edited."""


@dataclass(frozen=True)
class SavedModel(ABC):
    """A model's weights with the configuration of its run: a checkpoint, or a file of weights alone.

    ``state``: what a checkpoint's ``state.json`` holds.
    """

    path: Path
    state: dict[str, Any]

    @property
    def step(self) -> int:
        """Number of updates the weights have had."""
        return self.state["step"]

    @property
    def config(self) -> RunConfig:
        return from_dict(RunConfig, as_saved(self.state["config"]), str(self.path / STATE))

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(self.state["classes"])

    @abstractmethod
    def tensors(self, part: str, prefix: str = "") -> dict[str, Tensor]:
        """The tensors of a part whose names start with ``prefix``, unsharded and on the CPU."""

    @abstractmethod
    def note(self, part: str, instead: str = "sample with --weights model") -> str | None:
        """What a user who samples with the weights of ``part`` should know, and what to do ``instead``; None
        if there is nothing."""


class Checkpoint(SavedModel):
    """An opened checkpoint: ``state.json`` is verified; ``verify`` checks the tensor files."""

    @property
    def run(self) -> Path:
        """The run's folder."""
        return self.path.absolute().parent.parent

    def shapes(self, part: str) -> dict[str, tuple[torch.Size, torch.dtype]]:
        """Shape and dtype of every tensor of ``model``, ``ema`` or ``optimizer``."""
        with self._readable(part) as reader:
            found: dict[str, Any] = reader.read_metadata().state_dict_metadata
        return {name: (entry.size, entry.properties.dtype) for name, entry in found.items()}

    def note(self, part: str, instead: str = "sample with --weights model") -> str | None:
        return unripe(self.config.train.ema_decay, self.step, instead) if part == EMA else None

    def tensors(self, part: str, prefix: str = "") -> dict[str, Tensor]:
        whole = {
            name: torch.empty(shape, dtype=dtype)
            for name, (shape, dtype) in self.shapes(part).items()
            if name.startswith(prefix)
        }
        return self.fill(part, whole)

    def fill(self, part: str, tensors: dict[str, Tensor], world: World | None = None) -> dict[str, Tensor]:
        """Read a part into ``tensors`` by name. For sharded tensors each process reads its own rows, however
        many processes wrote them. ``UserError`` if one is missing or has another shape or dtype."""
        shapes, world = self.shapes(part), world or World()
        for name, tensor in tensors.items():
            if name not in shapes:
                raise UserError(f"{self.path / part}: lacks {name!r}, which this model needs")
            shape, dtype = shapes[name]
            if (shape, dtype) != (tensor.shape, tensor.dtype):
                needed = f"{tensor.dtype} {list(tensor.shape)}"
                raise UserError(f"{self.path / part}: {name!r} is {dtype} {list(shape)}, expected {needed}")
        quiet()
        with self._readable(part) as reader:
            dcp.load(tensors, storage_reader=reader, process_group=world.control, no_dist=world.size == 1)
        return tensors

    def verify(self, *parts: str, world: World | None = None) -> None:
        """Raise ``DamagedCheckpointError``, naming the file, unless all files of these parts (default: all)
        are exactly as written. Each process reads some of them."""
        world = world or World()
        files = sorted(file for file in self.state["files"] if not parts or file.split("/")[0] in parts)
        wrong = None
        try:
            for file in files[world.rank :: world.size]:
                self._verify(file)
        except DamagedCheckpointError as error:
            wrong = str(error)
        for message in filter(None, world.all_gather_object(wrong)):
            raise DamagedCheckpointError(message)

    def _verify(self, name: str) -> None:
        path, expected = self.path / name, self.state["files"][name]
        if not path.is_file():
            raise DamagedCheckpointError(f"{path}: missing from its checkpoint")
        try:
            size = path.stat().st_size
            sha256 = sha256_of(path)
        except OSError as error:  # a running trainer may be deleting it right now
            raise DamagedCheckpointError(f"{path}: cannot be read: {error.strerror}") from None
        if size != expected["bytes"]:
            verb = "truncated" if size < expected["bytes"] else "edited"
            raise DamagedCheckpointError(
                f"{path}: {verb}, {size} bytes where {expected['bytes']} were written"
            )
        if sha256 != expected["sha256"]:
            raise DamagedCheckpointError(f"{path}: edited or damaged, its SHA-256 is not the one in {STATE}")

    @contextmanager
    def _readable(self, part: str) -> Iterator[HuggingFaceStorageReader]:
        known = {file.rpartition("/")[2] for file in self.state["files"] if file.startswith(f"{part}/")}
        found = {path.name for path in (self.path / part).glob("*.safetensors")}
        for name in sorted(known ^ found):
            what = "missing from its checkpoint" if name in known else f"not in the checkpoint's {STATE}"
            raise DamagedCheckpointError(f"{self.path / part / name}: {what}")
        try:
            yield HuggingFaceStorageReader(str(self.path / part))
        except UNREADABLE as error:
            raise DamagedCheckpointError(f"{self.path / part}: cannot be read: {reason(error)}") from None


def _what_it_is(path: Path) -> str:
    """What ``path`` is instead of a run, and what to do with it, as the end of an error message."""
    if path.name == "checkpoints" and path.is_dir():
        return f"; its run is {str(path.parent)!r}"
    if (path / "model_index.json").exists():
        return ", but a pipeline: MDTPipeline.from_pretrained reads it (docs/diffusers.md)"
    if path.is_file():
        return (
            f", but a file; if it holds weights, 'mdt-fast convert {path} RUN' makes a run to sample from "
            "or train"
        )
    return f" (no checkpoints/ and no {STATE} in it)"


def open_checkpoint(path: Path) -> Checkpoint:
    """Open the checkpoint at ``path``, or the newest of the run at ``path``. ``UserError`` if it cannot."""
    if not path.exists():
        raise UserError(f"no run or checkpoint at {str(path)!r}")
    if (path / "checkpoints").is_dir():
        newest = latest(path)
        if newest is None:
            raise UserError(f"{str(path)!r} holds no complete checkpoint yet")
        path = newest
    elif not is_ours(path):
        raise UserError(f"{str(path)!r} is neither a run nor a checkpoint{_what_it_is(path)}")
    file = path / STATE
    try:
        state = json.loads(file.read_text())
        signed, actual = state.pop("sha256"), sign(state)
    except FileNotFoundError:
        raise DamagedCheckpointError(f"{file}: missing from its checkpoint") from None
    except NotADirectoryError:
        raise DamagedCheckpointError(f"{path}: not a checkpoint but a file") from None
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        raise DamagedCheckpointError(f"{file}: truncated or edited, it is not what was written") from None
    if signed != actual:
        raise DamagedCheckpointError(f"{file}: edited or damaged, its own SHA-256 does not match")
    if state.get("format") != FORMAT:
        raise UserError(f"{file}: format {state.get('format')}; this version reads format {FORMAT}")
    if not _is_complete(state):
        raise DamagedCheckpointError(f"{file}: edited, entries are missing or of another type")
    if NAME.fullmatch(path.name) and number_of(path) != state["step"]:
        raise DamagedCheckpointError(f"{path}: renamed, it is the checkpoint of step {state['step']}")
    return Checkpoint(path, state)


def is_ours(path: Path) -> bool:
    """Whether this is the folder of a run or of a checkpoint, complete or not."""
    named = NAME.search(path.name) is not None and path.is_dir()  # a file of weights may have such a name
    return named or (path / "checkpoints").is_dir() or (path / STATE).exists()


def steps(run: Path) -> list[Path]:
    """The run's complete checkpoints, oldest first."""
    found = [path for path in (run / "checkpoints").glob("step_*") if NAME.fullmatch(path.name)]
    return sorted(found, key=number_of)


def number_of(checkpoint: Path) -> int:
    """The step in a checkpoint's name."""
    return int(checkpoint.name.removeprefix("step_"))


def latest(run: Path) -> Path | None:
    """The newest complete checkpoint of a run, or None."""
    found = steps(run)
    return found[-1] if found else None


def newest_good(run: Path) -> Path | None:
    """The newest checkpoint of a run in which every file is intact, or None."""
    for path in reversed(steps(run)):
        try:
            open_checkpoint(path).verify()
        except UserError:
            continue
        return path
    return None


def make_folder(run: Path) -> None:
    """Make the folder for checkpoints. ``UserError`` if it is not writable, before the first save fails."""
    folder = run / "checkpoints"
    probe = folder / f"{PARTIAL}probe"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        clear(folder)
        probe.mkdir()
        probe.rmdir()
    except OSError as error:
        raise UserError(f"cannot write checkpoints in {str(folder)!r}: {error.strerror}") from None


def set_aside_later(run: Path, step: int) -> list[Path]:
    """Rename the checkpoints after ``step`` to ``superseded_...``: the run continues without them."""
    moved = []
    for path in steps(run):
        if number_of(path) > step:
            target = path.with_name(f"superseded_{path.name}")
            copies = 1
            while target.exists():
                copies += 1
                target = path.with_name(f"superseded_{path.name}.{copies}")
            path.rename(target)
            moved.append(target)
    return moved


def versions() -> dict[str, str]:
    """The library versions that a checkpoint records."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "safetensors": safetensors.__version__,
    }


def check_place(run: Path) -> None:
    """``UserError`` if ``run`` cannot be the folder of a run."""
    for path in (run, *run.parents):
        if path.exists() and not path.is_dir():
            raise UserError(f"out: {str(path)!r} is a file; a folder is needed")
    place = run.absolute()
    for path in (place, *place.parents):
        if path.name == "checkpoints" and steps(path.parent):  # they are pruned in time
            raise UserError(f"out: got {str(run)!r}, expected a run's folder, such as {str(path.parent)!r}")
    if (link := dead_link(run)) is not None:
        raise UserError(f"out: got {str(run)!r}, expected a folder: {str(link)!r} is a link to nothing")
    check_name(run, "out")


@contextmanager
def locked(run: Path) -> Iterator[None]:
    """Make the run's folder and lock it, so that no second process trains in it.

    The lock ends with the process, however it ends. Folders made here are removed again if the block raises
    before anything is written.
    """
    check_place(run)
    made = [folder for folder in (run, *run.parents) if not folder.exists()]
    run.mkdir(parents=True, exist_ok=True)
    lock = run / ".lock"
    new = not lock.exists()
    with open(lock, "w") as file:
        if not _lock(file) or not lock.exists() or not os.path.samestat(os.fstat(file.fileno()), lock.stat()):
            raise UserError(f"another process is training in {str(run)!r}")
        try:
            yield
        except BaseException:
            with suppress(OSError):  # it may be gone, and another process may use a folder above by now
                if new and list(run.iterdir()) == [lock]:
                    lock.unlink()
                    for folder in made:
                        folder.rmdir()
            raise


def _lock(file: TextIO) -> bool:
    """Lock the file until it is closed; False if another process has it. Always True without file locks."""
    try:
        import fcntl
    except ImportError:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a network file system without locks
        return True
    return True


def _is_complete(state: dict[str, Any]) -> bool:
    """Whether ``state.json`` has every entry that is read from it."""
    for key, kind in (
        ("step", int), ("config", dict), ("classes", list), ("num_images", int), ("optimizer_groups", list),
        ("files", dict), ("streak", int), ("skipped", int),
    ):  # fmt: skip
        value: Any = state.get(key)
        if type(value) is not kind or (isinstance(value, int) and value < 0):
            return False
    files = state["files"]
    return {name.split("/")[0] for name in files} == set(PARTS) and all(
        isinstance(entry, dict) and isinstance(entry.get("bytes"), int) and "sha256" in entry
        for entry in files.values()
    )


def clear(folder: Path) -> None:
    """Remove what a run killed while saving left behind; skip what cannot be removed."""
    for leftover in folder.glob(f"{PARTIAL}*"):
        if leftover.is_dir() and not leftover.is_symlink():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            with suppress(OSError):
                leftover.unlink()


def delete(checkpoint: Path) -> None:
    """Delete a checkpoint. It is renamed first, so that a kill half-way leaves no incomplete checkpoint."""
    doomed = checkpoint.with_name(PARTIAL + checkpoint.name)
    checkpoint.rename(doomed)
    shutil.rmtree(doomed)


def sign(state: dict[str, Any]) -> str:
    """The SHA-256 of a state, as stored in its file."""
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def reason(error: BaseException) -> str:
    """The error in one line; for torch.distributed.checkpoint's collected errors, the first of them."""
    if isinstance(error, dcp.api.CheckpointException):
        for cause, _ in error.failures.values():
            return reason(cause)
    return one_line(error)


def quiet() -> None:
    """Silence, from now on, the warning that there is a single process; that is intended."""
    warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
