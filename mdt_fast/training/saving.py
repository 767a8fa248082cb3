"""Writing checkpoints: copied at once, written while the training goes on, named when complete.

All processes save together. What is slow (serialising, the disk, SHA-256) happens in a thread, whose messages
go through a process group of its own.
"""

import json
import shutil
import warnings
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageWriter, SavePlan, SavePlanner
from torch.distributed.checkpoint import _hf_utils as header
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from ..errors import UserError
from ..files import aside, flush, sha256_of
from .checkpoint import (
    FORMAT,
    PARTIAL,
    STATE,
    clear,
    delete,
    latest,
    number_of,
    quiet,
    reason,
    sign,
    steps,
    versions,
)
from .distributed import World, is_loss

Parts = Mapping[str, dict[str, Tensor]]

STAGES_AGAIN = torch.torch_version.TorchVersion(torch.__version__) >= "2.13"
"""torch 2.11's stager forgets after one call how to copy a dict; later ones keep their buffers, too."""


def _new_stager() -> DefaultStager:
    """Copies to the host: to pinned memory and not waiting for each tensor, where there is a GPU."""
    pinned = torch.cuda.is_available()
    return DefaultStager(StagingOptions(pinned, False, False, pinned))


class Saver:
    """Writes the checkpoints of the run in ``run``; the last ``keep`` and each ``keep_every``-th step's stay.

    ``asynchronous`` False: each is complete when :meth:`save` returns.
    """

    def __init__(self, run: Path, world: World, *, keep: int, keep_every: int = 0, asynchronous: bool = True):
        self.run, self.world, self.asynchronous = run, world, asynchronous
        self.keep, self.keep_every = keep, keep_every
        self._stager = _new_stager()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None

    def save(self, step: int, parts: Parts, state: dict[str, Any]) -> None:
        """Copy ``parts`` and have them written as the checkpoint of ``step``, with ``state`` in its JSON.

        Waits for the one before to be complete. Raises ``UserError`` if that failed, or (not asynchronous)
        if this one does; complete checkpoints are kept.
        """
        self.wait()
        copies = {part: self._copied(tensors) for part, tensors in parts.items()}
        self._writing = self._thread.submit(self._write, step, copies, state)
        if not self.asynchronous:
            self.wait()

    def _copied(self, tensors: dict[str, Tensor]) -> Any:
        if not STAGES_AGAIN:
            self._stager = _new_stager()
        return self._stager.stage(tensors)

    @property
    def failed(self) -> bool:
        """Whether the checkpoint in work has failed; :meth:`wait` says why."""
        writing = self._writing
        return writing is not None and writing.done() and writing.exception() is not None

    @property
    def busy(self) -> bool:
        """Whether a checkpoint is in work."""
        return self._writing is not None and not self._writing.done()

    def wait(self) -> None:
        """Until the checkpoint in work is complete. ``UserError`` if it failed."""
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()

    def close(self) -> None:
        """Wait, and end the thread."""
        try:
            self.wait()
        finally:
            self._thread.shutdown(wait=False)
            self._stager.close()

    def _write(self, step: int, parts: Any, state: dict[str, Any]) -> None:
        folder = self.run / "checkpoints"
        final, partial = folder / f"step_{step:07d}", folder / f"{PARTIAL}step_{step:07d}"
        try:
            self._main(lambda: self._begin(folder, partial))
            files: dict[str, Any] = {}
            for part, tensors in parts.items():
                files |= self._write_part(partial / part, tensors)
            self._main(lambda: self._finish(partial, final, step, files, state))
            if self.world.main:
                self._prune(step)
        except (OSError, RuntimeError, dcp.api.CheckpointException) as error:
            if self.world.main:
                shutil.rmtree(partial, ignore_errors=True)
            if is_loss(error, self.world):
                raise  # not the disk's fault, and named where it is waited for
            last = latest(self.run)
            raise UserError(
                f"cannot save the checkpoint {str(final)!r}: {reason(error)}; "
                + (f"the last one is {str(last)!r}" if last else "there is no earlier one")
            ) from error

    def _begin(self, folder: Path, partial: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        clear(folder)
        partial.mkdir()

    def _write_part(self, folder: Path, tensors: dict[str, Tensor]) -> dict[str, Any]:
        """Name, size and SHA-256 of the files that all processes wrote."""
        quiet()
        writer = Writer(folder, self.world.rank)
        dcp.save(
            tensors, storage_writer=writer, process_group=self.world.checkpoints, no_dist=self.world.size == 1
        )
        own, failure = {}, None
        try:
            for path in folder.glob(f"shard-{self.world.rank + 1:05d}-*.safetensors"):
                own[f"{folder.name}/{path.name}"] = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
            flush(folder)
        except OSError as error:
            failure = error
        everyones = self.world.everyones((own, failure), self.world.checkpoints)
        _raise_first(failure for _, failure in everyones)
        return {name: entry for files, _ in everyones for name, entry in files.items()}

    def _finish(
        self, partial: Path, final: Path, step: int, files: dict[str, Any], state: dict[str, Any]
    ) -> None:
        whole = {"format": FORMAT, "step": step, **state, "versions": versions(), "files": files}
        with aside(partial / STATE) as file:
            file.write_text(json.dumps({**whole, "sha256": sign(whole)}, indent=1))
        flush(partial)
        partial.rename(final)
        flush(final.parent)

    def _prune(self, step: int) -> None:
        """Delete the older ones beyond ``keep``; what cannot be deleted stays, and says so."""
        older = [path for path in steps(self.run) if number_of(path) < step]
        for old in older[: max(0, len(older) - self.keep + 1)]:
            if self.keep_every and number_of(old) % self.keep_every == 0:
                continue
            if old.is_symlink() or not (old / STATE).is_file():
                continue  # not a checkpoint of ours to delete
            try:
                delete(old)
            except OSError as error:
                warnings.warn(f"the old checkpoint {str(old)!r} stays: {error}", stacklevel=2)

    def _main(self, work: Any) -> None:
        """``work`` on process 0 alone; what it raises is raised on all."""
        failure = None
        if self.world.main:
            try:
                work()
            except OSError as error:
                failure = error
        _raise_first(self.world.everyones(failure, self.world.checkpoints))


class Writer(HuggingFaceStorageWriter):
    """One file of each process, as torch's own writer makes it, but from the tensors where they are.

    Torch's puts the whole file together in memory first, twice, and no other Python thread runs meanwhile:
    the training would wait for some seconds a gigabyte.
    """

    def __init__(self, folder: Path, rank: int):
        super().__init__(str(folder), save_distributed=True)
        self.file = folder / f"shard-{rank + 1:05d}-model-00001-of-00001.safetensors"

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> torch.futures.Future[list[Any]]:
        tensors: dict[str, Tensor] = {}
        offsets: dict[str, Any] = {}
        for item in plan.items:
            assert item.tensor_data is not None
            tensor = planner.resolve_data(item)
            assert isinstance(tensor, Tensor)
            part = tensor.untyped_storage().nbytes() != tensor.nbytes  # no two may lie in one storage
            tensors[item.index.fqn] = tensor.clone() if part else tensor
            offsets[item.index.fqn] = {header.SAVED_OFFSETS_KEY: list(item.tensor_data.chunk.offsets)}
        if tensors:
            described = {
                header.CUSTOM_METADATA_KEY: json.dumps(offsets),
                header.DCP_VERSION_KEY: str(header.HF_DCP_VERSION),
                header.FORMAT_KEY: header.FORMAT_VALUE,
            }
            try:
                save_file(tensors, self.file, described)
            except SafetensorError as error:
                raise OSError(str(error)) from error
            flush(self.file)
        written: torch.futures.Future[list[Any]] = torch.futures.Future()
        written.set_result([])  # these files need no index, so nobody asks what is where
        return written


def _raise_first(failures: Any) -> None:
    for failure in failures:
        if failure is not None:
            raise failure
