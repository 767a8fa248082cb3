"""Writing checkpoints: copied at once, written while training continues, renamed when complete.

All processes save together. The slow parts (serialising, disk, SHA-256) run in a thread, which communicates
through its own process group.
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
from .distributed import World, is_lost_process

Parts = Mapping[str, dict[str, Tensor]]

STAGES_AGAIN = torch.torch_version.TorchVersion(torch.__version__) >= "2.13"
"""torch 2.11's stager can copy a dict only once; later stagers can be reused, and keep their buffers."""


def _new_stager() -> DefaultStager:
    """A stager that copies to the host; on a GPU, to pinned memory and without waiting for each tensor."""
    pinned = torch.cuda.is_available()
    return DefaultStager(StagingOptions(pinned, False, False, pinned))


class Saver:
    """Writes the checkpoints of ``run``; keeps the last ``keep`` and those of every ``keep_every``-th step.

    ``asynchronous`` False: the checkpoint is complete when :meth:`save` returns.
    """

    def __init__(self, run: Path, world: World, *, keep: int, keep_every: int = 0, asynchronous: bool = True):
        self.run, self.world, self.asynchronous = run, world, asynchronous
        self.keep, self.keep_every = keep, keep_every
        self._stager = _new_stager()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None

    def save(self, step: int, parts: Parts, state: dict[str, Any], bad: int = 0) -> None:
        """Copy ``parts`` and write them as the checkpoint of ``step``, with ``state`` in its JSON.

        ``bad``: how many steps up to this one had losses that were not finite; a checkpoint from before them
        is kept.

        Waits for the previous checkpoint to be complete. Raises ``UserError`` if that one failed, or (not
        asynchronous) if this one does; complete checkpoints are kept.
        """
        self.wait()
        copies = {part: self._copied(tensors) for part, tensors in parts.items()}
        self._writing = self._thread.submit(self._write, step, copies, state, bad)
        if not self.asynchronous:
            self.wait()

    def _copied(self, tensors: dict[str, Tensor]) -> Any:
        if not STAGES_AGAIN:
            self._stager = _new_stager()
        return self._stager.stage(tensors)

    @property
    def failed(self) -> bool:
        """Whether the checkpoint in progress has failed; :meth:`wait` raises its error."""
        writing = self._writing
        return writing is not None and writing.done() and writing.exception() is not None

    @property
    def busy(self) -> bool:
        """Whether a checkpoint is in progress."""
        return self._writing is not None and not self._writing.done()

    def wait(self) -> None:
        """Wait until the checkpoint in progress is complete. ``UserError`` if it failed."""
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

    def _write(self, step: int, parts: Any, state: dict[str, Any], bad: int) -> None:
        folder = self.run / "checkpoints"
        final, partial = folder / f"step_{step:07d}", folder / f"{PARTIAL}step_{step:07d}"
        try:
            self._main(lambda: self._begin(folder, partial))
            files: dict[str, Any] = {}
            for part, tensors in parts.items():
                files |= self._write_part(partial / part, tensors)
            self._main(lambda: self._finish(partial, final, step, files, state))
            if self.world.main:
                self._prune(step, step - bad)
        except (OSError, RuntimeError, dcp.api.CheckpointException) as error:
            if self.world.main:
                shutil.rmtree(partial, ignore_errors=True)
            if is_lost_process(error, self.world):
                raise  # not a disk error; reported by whoever waits for this checkpoint
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
        """Write one part; returns name, size and SHA-256 of the files of all processes."""
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
        gathered = self.world.all_gather_object((own, failure), self.world.checkpoints)
        _raise_first(failure for _, failure in gathered)
        return {name: entry for files, _ in gathered for name, entry in files.items()}

    def _finish(
        self, partial: Path, final: Path, step: int, files: dict[str, Any], state: dict[str, Any]
    ) -> None:
        whole = {"format": FORMAT, "step": step, **state, "versions": versions(), "files": files}
        with aside(partial / STATE) as file:
            file.write_text(json.dumps({**whole, "sha256": sign(whole)}, indent=1))
        flush(partial)
        partial.rename(final)
        flush(final.parent)

    def _prune(self, step: int, good: int) -> None:
        """Delete older checkpoints beyond ``keep``, but not the last up to the step ``good``; one that cannot
        be deleted stays, with a warning."""
        older = [path for path in steps(self.run) if number_of(path) < step]
        spared = [path for path in older if number_of(path) <= good][-1:] if good < step else []
        for old in older[: max(0, len(older) - self.keep + 1)]:
            if old in spared:
                continue
            if self.keep_every and number_of(old) % self.keep_every == 0:
                continue
            if old.is_symlink() or not (old / STATE).is_file():
                continue  # not our checkpoint to delete
            try:
                delete(old)
            except OSError as error:
                warnings.warn(f"could not delete the old checkpoint {str(old)!r}: {error}", stacklevel=2)

    def _main(self, work: Any) -> None:
        """Run ``work`` on rank 0 only; an ``OSError`` from it is raised on all ranks."""
        failure = None
        if self.world.main:
            try:
                work()
            except OSError as error:
                failure = error
        _raise_first(self.world.all_gather_object(failure, self.world.checkpoints))


class Writer(HuggingFaceStorageWriter):
    """Writes one file per process in the format of torch's own writer, but directly from the tensors.

    Torch's writer first builds the whole file in memory, twice, while no other Python thread can run:
    training would stall for some seconds per gigabyte.
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
            part = tensor.untyped_storage().nbytes() != tensor.nbytes  # no two may share a storage
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
        written.set_result([])  # these files need no index, so nobody asks where each tensor is
        return written


def _raise_first(failures: Any) -> None:
    for failure in failures:
        if failure is not None:
            raise failure
