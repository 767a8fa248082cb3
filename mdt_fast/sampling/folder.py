"""A folder of many samples: shards that several processes write, and that a later run can resume.

``settings.json`` has the settings that determine the images; ``shard-00012.npz`` has ``arr_0``, uint8 [n, H,
W, C], and ``arr_1``, the labels; ``samples_NxHxWxC.npz``, written last, has all of them for evaluators.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError
from ..files import DAMAGED, aside, flush, remove_leftovers, writable_folder
from .npz import adm_name, save_npz

SETTINGS = "settings.json"
OURS = re.compile(r"settings\.json|shard-\d{5,}\.npz|samples_\d+x\d+x\d+x\d+\.npz")
DIGEST = "sha256"
"""The key under which a setting that is a file has the hash of its bytes: {DIGEST: hash}."""
AGAIN = "resume with the same command"


def assembled_in(folder: Path) -> Path | None:
    """The ``samples_NxHxWxC.npz`` in a folder of shards, which may have been removed; None if this is no such
    folder. Raises ``UserError`` if it is not complete yet."""
    if not (folder / SETTINGS).is_file():
        return None
    for path in folder.glob("samples_*.npz"):
        return path
    if not any(folder.glob("shard-*.npz")):
        return None
    raise UserError(
        f"{str(folder)!r} holds samples that are not complete yet; {AGAIN}, mdt-fast sample --out"
    )


class SampleFolder:
    """Folder ``root`` with one image for each of ``labels``, in shards of ``shard_size``.

    ``settings``: everything that determines the images, under the user's names for it, JSON-ready.
    """

    def __init__(self, root: Path, settings: Mapping[str, Any], labels: Sequence[int], shard_size: int):
        self.root, self.labels, self.shard_size = root, labels, shard_size
        self.settings = dict(settings)
        self.shards = -(-len(labels) // shard_size)

    def prepare(self) -> None:
        """Make the folder, or check that it was begun with the same settings. ``UserError`` names the first
        setting that differs, or a file that is not ours."""
        try:
            names = writable_folder(self.root)
        except OSError as error:
            raise UserError(f"out: cannot write in {str(self.root)!r}: {error.strerror}") from None
        for name in sorted(names):
            if not OURS.fullmatch(name) or SETTINGS not in names:
                raise UserError(
                    f"out: {str(self.root)!r} holds other files, such as {name!r}; an empty folder is needed"
                )
        path = self.root / SETTINGS
        if SETTINGS in names:
            self._check_same(path)
            return
        with aside(path) as file:  # each of several processes writes the same
            file.write_text(json.dumps(self.settings, indent=1) + "\n")

    def _check_same(self, path: Path) -> None:
        try:
            found = json.loads(path.read_text())
            before = {name: found.get(name) for name in self.settings}
        except (OSError, ValueError, AttributeError, RecursionError):
            raise UserError(f"{path}: truncated or edited since it was written") from None
        for name, now in json.loads(json.dumps(self.settings)).items():
            if before[name] != now:
                raise UserError(
                    f"out: {str(self.root)!r} was begun {_difference(name, before[name], now)}; {AGAIN}, "
                    "or choose another folder"
                )

    def span(self, shard: int) -> range:
        """The images of a shard."""
        return range(len(self.labels))[shard * self.shard_size : (shard + 1) * self.shard_size]

    def missing(self, rank: int = 0, world: int = 1) -> list[int]:
        """This process's missing shards. Leftovers of killed processes are removed."""
        mine = range(self.shards)[rank::world]
        if rank == 0:
            for left in self.root.glob(".samples_*.npz.*.partial"):
                left.unlink(missing_ok=True)
        remove_leftovers(self.root, [self._path(shard).name for shard in mine])
        return [shard for shard in mine if not self._path(shard).exists()]

    def drawn(self) -> int:
        """The number of images written so far, by all processes."""
        return sum(len(self.span(shard)) for shard in range(self.shards) if self._path(shard).exists())

    @property
    def complete(self) -> bool:
        return all(self._path(shard).exists() for shard in range(self.shards))

    def write(self, shard: int, images_NHWC: np.ndarray) -> None:
        """Write a shard, completely or not at all."""
        span = self.span(shard)
        try:
            save_npz(self._path(shard), images_NHWC, self.labels[span.start : span.stop])
            flush(self.root)
        except OSError as error:
            raise UserError(
                f"cannot write {str(self._path(shard))!r}: {error.strerror}; complete shards stay, {AGAIN}"
            ) from None

    def read(self, shard: int) -> np.ndarray:
        """A shard's images, uint8 [n, H, W, C]. ``UserError`` if it is damaged."""
        path, span = self._path(shard), self.span(shard)
        try:
            with np.load(path, allow_pickle=False) as saved:
                images, labels = saved["arr_0"], saved["arr_1"]
            whole = images.dtype == np.uint8 and images.ndim == 4 and len(images) == len(span)
            if whole and labels.tolist() == list(self.labels[span.start : span.stop]):
                return images
        except DAMAGED:
            pass
        raise UserError(f"{path}: damaged since it was written; remove it and {AGAIN}")

    def images(self) -> Iterator[np.ndarray]:
        """All images, one shard at a time."""
        return (self.read(shard) for shard in range(self.shards))

    def pick(self, indices: Sequence[int]) -> np.ndarray:
        """The images with these indices, which must be in ascending order."""
        found = []
        for shard in range(self.shards):
            span = self.span(shard)
            if wanted := [i - span.start for i in indices if i in span]:
                found.append(self.read(shard)[wanted])
        return np.concatenate(found)

    def assemble(self) -> Path:
        """The ``samples_NxHxWxC.npz`` of a complete folder, written if it is missing; one shard at a time is
        in memory."""
        H, W, C = self.read(0).shape[1:]
        path = self.root / adm_name(len(self.labels), H, W, C)
        for _ in range(3):
            if path.exists():
                return path
            try:
                save_npz(path, self.images(), self.labels)
                flush(self.root)
            except FileNotFoundError:  # process 0 was just starting, and took our file for a leftover
                continue
            except OSError as error:
                raise UserError(f"cannot write {str(path)!r}: {error.strerror}; {AGAIN}") from None
        if path.exists():
            return path
        raise UserError(f"cannot write {str(path)!r}: another process removes it; {AGAIN}")

    def _path(self, shard: int) -> Path:
        return self.root / f"shard-{shard:05d}.npz"


def _difference(name: str, before: Any, now: Any) -> str:
    """How the folder was begun; a file's hash is left out, as it tells a user nothing."""
    if not any(isinstance(value, dict) and DIGEST in value for value in (before, now)):
        begun = f"without {name}" if before is None else f"with {name} {_short(before)}"
        return f"{begun}, now {'there is none' if now is None else f'it is {_short(now)}'}"
    if before is None:
        return f"without {name}"
    return f"with {name}, now there is none" if now is None else f"with another {name}"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
