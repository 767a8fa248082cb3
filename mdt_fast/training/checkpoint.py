"""Checkpoints: complete or not there, checked when read, never pickled.

A checkpoint is a folder ``checkpoints/step_0000940/`` with ``model``, ``ema`` and ``optimizer.safetensors``
and ``state.json`` (step, configuration, versions, and the SHA-256 of every file, itself included). It is
written under a temporary name beside its place, flushed to the disk and then renamed; so a run killed at
any moment leaves only complete ones. When a run goes back to an earlier checkpoint, the later ones are set
aside, not deleted.
"""

import hashlib
import json
import os
import platform
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..config import RunConfig, from_dict, to_dict
from ..errors import UserError
from ..files import aside, flush
from .optim import Ema

FORMAT = 1
STATE = "state.json"
WEIGHTS = {"model": "model.safetensors", "ema": "ema.safetensors"}
OPTIMIZER = "optimizer.safetensors"
METRICS = "metrics.safetensors"  # only if the run was stopped between two rows of its metrics
NAME = re.compile(r"step_(\d{7,})")
PARTIAL = ".partial_"


class DamagedCheckpointError(UserError):
    """A checkpoint that is torn, truncated or edited."""


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint: ``state.json`` is verified, tensor files are when they are read."""

    path: Path
    state: dict[str, Any]

    @property
    def step(self) -> int:
        """How many updates the weights have had."""
        return self.state["step"]

    @property
    def config(self) -> RunConfig:
        return from_dict(RunConfig, self.state["config"], str(self.path / STATE))

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(self.state["classes"])

    @property
    def run(self) -> Path:
        """The run's folder."""
        return self.path.parent.parent

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The verified content of one tensor file, on the CPU."""
        self.verify(name)
        try:
            return load_file(self.path / name)
        except (OSError, safetensors.SafetensorError) as error:
            raise DamagedCheckpointError(f"{self.path / name}: cannot be read: {error}") from None

    def verify(self, name: str) -> None:
        """Raise ``DamagedCheckpointError``, naming the file, unless it is the one that was written."""
        path, expected = self.path / name, self.state["files"][name]
        if not path.is_file():
            raise DamagedCheckpointError(f"{path}: missing from its checkpoint")
        try:
            size = path.stat().st_size
            sha256 = _sha256(path)
        except OSError as error:  # a trainer may be deleting it just now
            raise DamagedCheckpointError(f"{path}: cannot be read: {error.strerror}") from None
        if size != expected["bytes"]:
            verb = "truncated" if size < expected["bytes"] else "edited"
            raise DamagedCheckpointError(
                f"{path}: {verb}, {size} bytes where {expected['bytes']} were written"
            )
        if sha256 != expected["sha256"]:
            raise DamagedCheckpointError(f"{path}: edited or damaged, its SHA-256 is not the one in {STATE}")

    def restore_optimizer(self, optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
        """Put the saved state into ``optimizer``, which must be over ``model``'s trained parameters."""
        names = _trained(model)
        state: dict[int, dict[str, Tensor]] = {}
        index = {name: i for i, name in enumerate(names)}
        for key, tensor in self.tensors(OPTIMIZER).items():
            param, _, entry = key.rpartition("/")
            if param not in index:
                raise UserError(
                    f"{self.path / OPTIMIZER}: state of {param!r}, which the model does not train"
                )
            state.setdefault(index[param], {})[entry] = tensor
        optimizer.load_state_dict({"state": state, "param_groups": self.state["optimizer_groups"]})


def open_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint at ``path``, or the newest of the run at ``path``. ``UserError`` says what is wrong."""
    if not path.exists():
        raise UserError(f"no run or checkpoint at {str(path)!r}")
    if (path / "checkpoints").is_dir():
        newest = latest(path)
        if newest is None:
            raise UserError(f"{str(path)!r} holds no complete checkpoint yet")
        path = newest
    elif not NAME.search(path.name) and not (path / STATE).exists():
        raise UserError(
            f"{str(path)!r} is neither a run (no checkpoints/ in it) nor a checkpoint (no {STATE})"
        )
    file = path / STATE
    try:
        state = json.loads(file.read_text())
        signed, actual = state.pop("sha256"), _sign(state)
    except FileNotFoundError:
        raise DamagedCheckpointError(f"{file}: missing from its checkpoint") from None
    except NotADirectoryError:
        raise DamagedCheckpointError(f"{path}: not a checkpoint but a file") from None
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        raise DamagedCheckpointError(f"{file}: truncated or edited, it is not what was written") from None
    if signed != actual:
        raise DamagedCheckpointError(f"{file}: edited or damaged, its own SHA-256 does not fit")
    if state.get("format") != FORMAT:
        raise UserError(f"{file}: format {state.get('format')}; this version reads format {FORMAT}")
    if not _is_complete(state):
        raise DamagedCheckpointError(f"{file}: edited, entries are missing or of another type")
    return Checkpoint(path, state)


def steps(run: Path) -> list[Path]:
    """The run's complete checkpoints, oldest first."""
    found = [path for path in (run / "checkpoints").glob("step_*") if NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step_")))


def latest(run: Path) -> Path | None:
    """The newest complete checkpoint of a run, if there is one."""
    found = steps(run)
    return found[-1] if found else None


def newest_good(run: Path) -> Path | None:
    """The newest checkpoint of a run in which every file is as it was written."""
    for path in reversed(steps(run)):
        try:
            checkpoint = open_checkpoint(path)
            for name in checkpoint.state["files"]:
                checkpoint.verify(name)
        except UserError:
            continue
        return path
    return None


def save(
    run: Path,
    *,
    step: int,
    config: RunConfig,
    classes: tuple[str, ...],
    num_images: int,
    model: nn.Module,
    ema: Ema,
    optimizer: torch.optim.Optimizer,
    pending: dict[str, Tensor],
) -> Path:
    """Write the checkpoint of ``step``, then delete the oldest beyond ``config.train.keep``.

    ``pending``: what ``Metrics.pending`` returned. Raises ``UserError`` if the disk is full or a weight is
    not finite; the checkpoints before are kept.
    """
    for name, weights in (("model", model), ("ema", ema.model)):
        largest = torch._foreach_norm(list(weights.parameters()), torch.inf)
        if not torch.stack([value.float() for value in largest]).isfinite().all():
            raise UserError(f"the {name}'s weights are not finite after step {step}; nothing was saved")
    folder = run / "checkpoints"
    final, partial = folder / f"step_{step:07d}", folder / f"{PARTIAL}step_{step:07d}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _clear(folder)
        partial.mkdir()
        optimizer_state = optimizer.state_dict()
        names = _trained(model)
        files = {
            WEIGHTS["model"]: model.state_dict(),
            WEIGHTS["ema"]: ema.model.state_dict(),
            OPTIMIZER: {
                f"{names[index]}/{entry}": tensor
                for index, entries in optimizer_state["state"].items()
                for entry, tensor in entries.items()
            },
        }
        if pending:
            files[METRICS] = pending
        for name, tensors in files.items():
            _write_tensors(partial / name, tensors)
        state = {
            "format": FORMAT,
            "step": step,
            "config": to_dict(config),
            "classes": list(classes),
            "num_images": num_images,
            "optimizer_groups": optimizer_state["param_groups"],
            "versions": versions(),
            "files": {
                name: {"bytes": (partial / name).stat().st_size, "sha256": _sha256(partial / name)}
                for name in files
            },
        }
        with aside(partial / STATE) as file:
            file.write_text(json.dumps({**state, "sha256": _sign(state)}, indent=1))
        flush(partial)
        partial.rename(final)
        flush(folder)
    except (OSError, safetensors.SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        last = latest(run)
        raise UserError(
            f"cannot save the checkpoint {str(final)!r}: {error}; "
            + (f"the last one is {str(last)!r}" if last else "there is no earlier one")
        ) from error
    for old in steps(run)[: -config.train.keep]:
        _delete(old)
    return final


def make_folder(run: Path) -> None:
    """The folder for checkpoints. ``UserError`` now, rather than at the first save, if it is not writable."""
    folder = run / "checkpoints"
    probe = folder / f"{PARTIAL}probe"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _clear(folder)
        probe.mkdir()
        probe.rmdir()
    except OSError as error:
        raise UserError(f"cannot write checkpoints in {str(folder)!r}: {error.strerror}") from None


def set_aside_later(run: Path, step: int) -> list[Path]:
    """Rename the checkpoints after ``step`` to ``superseded_...``: the run goes on without them."""
    moved = []
    for path in steps(run):
        if int(path.name.removeprefix("step_")) > step:
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


@contextmanager
def locked(run: Path) -> Iterator[None]:
    """Make the folder and keep a second process from training in it.

    The lock ends with the process, however it ends. What was made here is removed again if the block raises
    before anything is written.
    """
    if run.exists() and not run.is_dir():
        raise UserError(f"--out: {str(run)!r} is a file; a folder is needed")
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
            if new and list(run.iterdir()) == [lock]:
                lock.unlink()
                with suppress(OSError):  # another process may use a folder above by now
                    for folder in made:
                        folder.rmdir()
            raise


def _lock(file: TextIO) -> bool:
    """Whether the file is ours until it is closed; always on platforms without such locks."""
    try:
        import fcntl
    except ImportError:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_complete(state: dict[str, Any]) -> bool:
    """Whether everything that is read from ``state.json`` is there."""
    for key, kind in (
        ("step", int), ("config", dict), ("classes", list), ("num_images", int), ("optimizer_groups", list),
        ("files", dict),
    ):  # fmt: skip
        if not isinstance(state.get(key), kind):
            return False
    files = state["files"]
    return {*WEIGHTS.values(), OPTIMIZER} <= files.keys() and all(
        isinstance(entry, dict) and isinstance(entry.get("bytes"), int) and "sha256" in entry
        for entry in files.values()
    )


def _clear(folder: Path) -> None:
    """Remove what a run left that was killed while it saved."""
    for leftover in folder.glob(f"{PARTIAL}*"):
        if leftover.is_dir() and not leftover.is_symlink():
            shutil.rmtree(leftover)
        else:
            leftover.unlink()


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    seen: set[int] = set()
    unshared = {}
    for name, tensor in tensors.items():
        shared = tensor.untyped_storage().data_ptr() in seen  # the format takes no two views of one storage
        seen.add(tensor.untyped_storage().data_ptr())
        unshared[name] = (tensor.clone() if shared else tensor).detach().contiguous()
    with aside(path) as file:
        save_file(unshared, file)


def _delete(checkpoint: Path) -> None:
    """Out of sight in one rename first, so that a kill half-way leaves no torn checkpoint."""
    doomed = checkpoint.with_name(PARTIAL + checkpoint.name)
    checkpoint.rename(doomed)
    shutil.rmtree(doomed)


def _trained(model: nn.Module) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sign(state: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()
