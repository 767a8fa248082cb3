"""Checkpoints: complete or not there, checked when read, never pickled.

A checkpoint is a folder ``checkpoints/step_0000940/`` with ``model``, ``ema`` and ``optimizer.safetensors``
and ``state.json`` (step, configuration, versions, and the SHA-256 of every file, itself included). It is
written under a temporary name beside its place, flushed to the disk and then renamed; so a run killed at
any moment leaves only complete ones. When a run goes back to an earlier checkpoint, the later ones are set
aside, not deleted.
"""

import hashlib
import json
import platform
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
        return load_file(self.path / name)

    def verify(self, name: str) -> None:
        """Raise ``DamagedCheckpointError``, naming the file, unless it is the one that was written."""
        path, expected = self.path / name, self.state["files"][name]
        if not path.is_file():
            raise DamagedCheckpointError(f"{path}: missing from its checkpoint")
        size = path.stat().st_size
        if size != expected["bytes"]:
            verb = "truncated" if size < expected["bytes"] else "edited"
            raise DamagedCheckpointError(
                f"{path}: {verb}, {size} bytes where {expected['bytes']} were written"
            )
        if _sha256(path) != expected["sha256"]:
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
        signed = state.pop("sha256")
    except FileNotFoundError:
        raise DamagedCheckpointError(f"{file}: missing from its checkpoint") from None
    except (ValueError, KeyError, AttributeError, TypeError):
        raise DamagedCheckpointError(f"{file}: truncated or edited, it is not what was written") from None
    if signed != _sign(state):
        raise DamagedCheckpointError(f"{file}: edited or damaged, its own SHA-256 does not fit")
    if state["format"] != FORMAT:
        raise UserError(f"{file}: format {state['format']}; this version reads format {FORMAT}")
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
) -> Path:
    """Write the checkpoint of ``step``, then delete the oldest beyond ``config.train.keep``."""
    folder = run / "checkpoints"
    final, partial = folder / f"step_{step:07d}", folder / f"{PARTIAL}step_{step:07d}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob(f"{PARTIAL}*"):  # of a run that was killed while it saved
            shutil.rmtree(leftover)
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
    """Keep a second process from training in the folder; the lock ends with the process, however it ends."""
    try:
        import fcntl
    except ImportError:  # not on this platform
        yield
        return
    with open(run / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process is training in {str(run)!r}") from None
        yield


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
