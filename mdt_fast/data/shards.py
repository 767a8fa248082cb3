"""A webdataset: images and their classes in ``.tar`` shards, read in place.

A sample consists of the members of a shard with the same key, which is the path up to the first dot of the
file name: ``n01/0001.jpg`` with ``n01/0001.cls`` (the class index as text) or ``n01/0001.json`` (with a
``label``). Only regular members are read, at their offsets; nothing is extracted.
"""

import io
import json
import random
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..config import DataConfig
from ..errors import UserError, one_line
from .descriptors import Files
from .images import SUFFIXES, mirrored, read_image, to_pixels

MAX_CLASS_BYTES = 1 << 20  # of a .cls or .json member
MAX_CLASSES = 100_000  # without a file of names, every index up to the largest is a class


class WebDataset:
    """The images of all ``.tar`` files directly in a folder, sorted by file name.

    Class names come from ``classes.json`` (a list, or index to name) or ``classes.txt`` (one per line) in the
    folder, else they are the indices as text. ``UserError`` names a shard or member that cannot be used.
    """

    in_memory = False

    def __init__(self, config: DataConfig):
        root, self.conditional = Path(config.source), config.conditional
        self.shards = list_shards(root)
        self._files = Files()
        self._names: list[str] = []
        shards: list[int] = []
        spans: list[tuple[int, int]] = []
        labels: list[int] = []
        for number, shard in enumerate(self.shards):
            for sample in self._index(shard):
                self._names.append(sample.name)
                shards.append(number)
                spans.append((sample.offset, sample.size))
                labels.append(sample.label)
        if not labels:
            raise UserError(
                f"data.source: no images in the {len(self.shards)} .tar shards of {str(root)!r}; each needs "
                f"KEY{'|'.join(SUFFIXES)} and KEY.cls or KEY.json (or, in training, --unconditional)"
            )
        self._shard, self._spans = np.array(shards, dtype=np.int32), np.array(spans, dtype=np.int64)
        self.labels = np.array(labels, dtype=np.int64)
        self.classes = class_names(root, int(self.labels.max()) + 1)
        self.size, self.channels, self.crop = config.image_size, config.channels, config.crop
        self.shape: tuple[int, int, int] = (self.channels, self.size, self.size)

    def load(self, index: int, rng: random.Random, mirror: bool = False) -> np.ndarray:
        shard = self.shards[self._shard[index]]
        name = f"{shard}/{self._names[index]}"
        data = io.BytesIO(self._files.read(shard, *map(int, self._spans[index])))
        pixels = to_pixels(read_image(data, self.channels, name), name, self.size, self.crop, rng)
        return mirrored(pixels) if mirror else pixels

    def member(self, index: int) -> tuple[str, int]:
        shard = self.shards[self._shard[index]]
        return f"{shard.name}/{self._names[index]}", int(self._spans[index, 1])

    def _index(self, shard: Path) -> Iterator["_Sample"]:
        """The samples of one shard in order."""
        images: dict[str, tarfile.TarInfo] = {}
        classes: dict[str, tarfile.TarInfo] = {}
        for member in read_members(shard):
            folder, slash, base = member.name.rpartition("/")
            stem, _, kind = base.partition(".")
            if not stem:  # a hidden file
                continue
            key, kind = f"{folder}{slash}{stem}", kind.lower()
            if f".{kind}" in SUFFIXES:
                if key in images:
                    raise UserError(
                        f"{shard}: two images with one key: {images[key].name!r}, {member.name!r}"
                    )
                images[key] = member
            elif kind == "cls" or (kind == "json" and key not in classes):
                classes[key] = member
        for key, member in images.items():
            if not self.conditional:
                yield _Sample(member.name, member.offset_data, member.size, 0)
                continue
            if key not in classes:
                raise UserError(
                    f"{shard}: {member.name!r} has no class; {key}.cls or {key}.json is needed (except in "
                    "training with --unconditional)"
                )
            yield _Sample(member.name, member.offset_data, member.size, self._label(shard, classes[key]))
        for key, member in classes.items():
            if key not in images and member.name.lower().endswith(".cls"):
                raise UserError(f"{shard}: {member.name!r} has no image; {key}{'|'.join(SUFFIXES)} is needed")

    def _label(self, shard: Path, member: tarfile.TarInfo) -> int:
        """The class index that a .cls or .json member holds."""
        name = f"{shard}/{member.name}"
        if member.size > MAX_CLASS_BYTES:
            raise UserError(f"{name}: not a class index, it has {member.size} bytes")
        text = self._files.read(shard, member.offset_data, member.size).decode(errors="replace")
        try:
            if member.name.lower().endswith(".cls"):
                label = int(text)
            else:
                label = json.loads(text)["label"]
                if type(label) is not int:
                    raise TypeError
        except (ValueError, TypeError, KeyError, RecursionError):
            raise UserError(f"{name}: got {text.strip()[:40]!r}, expected a class index") from None
        if not 0 <= label < MAX_CLASSES:
            raise UserError(f"{name}: class indices are 0 to {MAX_CLASSES - 1}, got {label}")
        return label


@dataclass(frozen=True)
class _Sample:
    name: str
    offset: int
    size: int
    label: int


def list_shards(root: Path) -> list[Path]:
    """The .tar files directly in ``root``, sorted. ``UserError`` if there are none."""
    if not (shards := find_shards(root)):
        raise UserError(f"data.source: no .tar shards in {str(root)!r}")
    return shards


def find_shards(root: Path) -> list[Path]:
    """The .tar files directly in ``root``, sorted; empty if it is no folder."""
    if not root.is_dir():
        return []
    try:
        return sorted(
            path
            for path in root.iterdir()
            if path.suffix.lower() == ".tar" and not path.name.startswith(".") and path.is_file()
        )
    except OSError as error:
        raise UserError(f"data.source: cannot read {str(root)!r}: {error.strerror}") from None


def read_members(shard: Path) -> Iterator[tarfile.TarInfo]:
    """The regular members of an uncompressed tar file. ``UserError`` if it is truncated or not a tar file."""
    try:
        with open(shard, "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            end = 0
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # otherwise it keeps them all
                if tar.offset <= end or member.size < 0:
                    raise tarfile.ReadError("a member has an impossible size")
                end = tar.offset
                if member.isreg() and not member.issparse():
                    yield member
            # tarfile stops silently at a truncated or damaged header; a complete file ends with zeros.
            file.seek(tar.offset)
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError(f"no member and no end mark at byte {tar.offset}")
    except (tarfile.TarError, ValueError, OverflowError) as error:
        reason = one_line(error)
        raise UserError(f"{shard}: truncated, damaged or not a plain .tar file: {reason}") from None
    except OSError as error:
        raise UserError(f"{shard}: cannot be read: {error.strerror}") from None


def class_names(root: Path, count: int) -> tuple[str, ...]:
    """Class names by index, for at least ``count`` classes."""
    for file, parse in ((root / "classes.json", _names_of_json), (root / "classes.txt", str.splitlines)):
        try:
            names = parse(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            continue
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            raise UserError(
                f"{file}: expected a list of class names, or an object of names by index"
            ) from None
        if len(names) < count:
            raise UserError(
                f"{file}: names {len(names)} classes, but the images have indices up to {count - 1}"
            )
        return tuple(names)
    return tuple(str(index) for index in range(count))


def _names_of_json(text: str) -> list[str]:
    names = json.loads(text)
    if isinstance(names, dict):
        names = [names[str(index)] for index in range(len(names))]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise TypeError
    return names
