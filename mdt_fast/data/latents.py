"""An encoded set: posterior moments of every image and its mirror image, in checksummed shards.

A folder holds ``index.json`` and the shards ``shard-00000.safetensors`` and so on, with ``moments`` and
``mirrored`` [n, 2C, s, s] (mean, then log variance) and ``labels`` [n] int64. A ``shard-00000.json`` beside
each shard records how it was made; the index collects them. JSON files end with a SHA-256 of the rest of the
file. Images that could not be read are listed in the index as dropped, and have no row.
"""

import bisect
import hashlib
import json
import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..config import DataConfig, from_dict
from ..errors import UserError
from ..files import sha256_of
from .descriptors import Files

KIND, FORMAT = "mdt-fast latents", 1
INDEX = "index.json"
DTYPES: dict[str, tuple[str, np.dtype]] = {
    "float32": ("F32", np.dtype("<f4")),
    "float16": ("F16", np.dtype("<f2")),
}
MAX_HEADER = 1 << 20  # bytes of a shard's header; ours have about 300


class DamagedError(UserError):
    """A file of an encoded set is truncated or edited."""


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """Everything that determines the values; all shards of a folder agree on it.

    ``channels``: C of the latents; ``side``: s, in latents. ``dtype``: of the shards; ``vae_dtype``: of the
    autoencoder's weights during encoding. ``source_sha256``: over classes, and names, sizes and labels of all
    images.
    """

    image_size: int
    crop: Literal["center"]
    mirrored: bool
    dtype: Literal["float32", "float16"]
    vae_dtype: Literal["float32", "bfloat16"]
    vae_sha256: str
    scale: float
    shift: float
    channels: int
    side: int
    shard_size: int
    source_samples: int
    source_sha256: str

    @property
    def shards(self) -> int:
        return -(-self.source_samples // self.shard_size)

    def span(self, shard: int) -> range:
        """The source samples in shard number ``shard``."""
        return range(shard * self.shard_size, min((shard + 1) * self.shard_size, self.source_samples))

    def tensors(self, samples: int) -> dict[str, tuple[str, list[int]]]:
        """Names, safetensors dtypes and shapes of a shard's tensors."""
        moments = (DTYPES[self.dtype][0], [samples, 2 * self.channels, self.side, self.side])
        mirrored = {"mirrored": moments} if self.mirrored else {}
        return {"moments": moments, **mirrored, "labels": ("I64", [samples])}


@dataclass(frozen=True)
class Shard:
    """A shard's file and its expected contents."""

    file: str
    samples: int
    bytes: int
    sha256: str

    def check_size(self, root: Path) -> None:
        """``UserError`` if the file is missing or has another size."""
        path = root / self.file
        try:
            size = path.stat().st_size
        except FileNotFoundError:
            raise UserError(f"{path}: missing") from None
        if size != self.bytes:
            verb = "truncated" if size < self.bytes else "edited"
            raise UserError(f"{path}: {verb}, {size} bytes where {self.bytes} were written")


class LatentSet:
    """The images of a folder that ``mdt-fast encode`` wrote, as moments [2C, s, s] float32.

    ``channels``: C; ``size``: s; ``image_size``: in pixels; ``scale`` and ``shift``: of the latents that the
    model sees (``sample_posterior``); ``autoencoder``: its hub name or folder; ``fingerprint``: that of its
    weights; ``digest``: the index's SHA-256, which covers those of the shards; ``contents``: the same without
    the autoencoder's name. Opening checks the index and
    every shard's size and header; ``verify`` checks every byte. ``UserError`` names what is missing,
    truncated or edited.
    """

    in_memory = False

    def __init__(self, root: Path | str):
        self.root = Path(root)
        path = self.root / INDEX
        if not path.exists():
            raise UserError(
                f"{path}: missing, encoding is not finished; resume with the same mdt-fast encode command"
            )
        index = read_signed(path)
        try:
            self.encoding: Encoding = from_dict(Encoding, index["encoding"], str(path))
            self.shards: list[Shard] = [from_dict(Shard, entry, str(path)) for entry in index["shards"]]
            self.classes = tuple(str(name) for name in index["classes"])
            self.autoencoder = str(index["autoencoder"])
            self.dropped = tuple(str(entry["name"]) for entry in index["dropped"])
            self.digest = str(index["sha256"])
            self.contents = _digest({k: v for k, v in index.items() if k not in ("autoencoder", "sha256")})
            names = [shard_name(number) for number in range(len(self.shards))]
            if [shard.file for shard in self.shards] != names or len(names) != self.encoding.shards:
                raise KeyError
        except (KeyError, TypeError, ArithmeticError):
            raise UserError(f"{path}: edited, entries are missing or of another type") from None
        self.channels, self.size = self.encoding.channels, self.encoding.side
        self.shape: tuple[int, int, int] = (2 * self.channels, self.size, self.size)
        self.image_size, self.mirrored = self.encoding.image_size, self.encoding.mirrored
        self.scale, self.shift = self.encoding.scale, self.encoding.shift
        self.fingerprint = self.encoding.vae_sha256
        self._files = Files()
        self._dtype = DTYPES[self.encoding.dtype][1]
        self._row_bytes = 2 * self.channels * self.size**2 * self._dtype.itemsize
        self._offsets: list[dict[str, int]] = []
        self._firsts = [0]  # each shard's first sample, then the total number
        labels = []
        for shard in self.shards:
            shard.check_size(self.root)
            self._offsets.append(self._header(shard))
            labels.append(self._labels(shard, self._offsets[-1]["labels"]))
            self._firsts.append(self._firsts[-1] + shard.samples)
        self.labels = np.concatenate(labels) if labels else np.empty(0, np.int64)
        if len(self.labels) == 0:
            raise UserError(f"{path}: edited, it lists no samples")

    def load(self, index: int, rng: random.Random, mirror: bool = False) -> np.ndarray:
        """Moments [2C, s, s] float32 of sample ``index``, or of its mirror; ``rng`` is not used."""
        if mirror and not self.mirrored:
            raise UserError(f"data.flip: {str(self.root)!r} was encoded without mirrors (--no-mirror)")
        if not 0 <= index < len(self.labels):
            raise IndexError(index)
        number = bisect.bisect_right(self._firsts, index) - 1
        start = self._offsets[number]["mirrored" if mirror else "moments"]
        row = np.empty((2 * self.channels, self.size, self.size), dtype=self._dtype)
        path = self.root / self.shards[number].file
        self._files.fill(path, start + (index - self._firsts[number]) * self._row_bytes, row)
        return row.astype(np.float32, copy=False)

    def check(self, config: DataConfig) -> None:
        """``UserError`` if ``config`` asks for something that was not encoded."""
        where = repr(str(self.root))
        if config.image_size != self.image_size:
            raise UserError(
                f"data.image_size: the latents in {where} are from {self.image_size}x{self.image_size} "
                f"pixels, got {config.image_size}"
            )
        if config.crop != self.encoding.crop:
            raise UserError(
                f"data.crop: {where} holds {self.encoding.crop} crops, encoded once; got {config.crop!r}"
            )
        if config.flip and not self.mirrored:
            raise UserError(f"data.flip: {where} was encoded without mirrors (--no-mirror)")

    def verify(self, on_shard: Callable[[int], None] = lambda done: None) -> None:
        """Read everything; ``UserError`` names the shards that differ from what was written."""
        damaged = []
        for done, shard in enumerate(self.shards, 1):
            shard.check_size(self.root)
            if sha256_of(self.root / shard.file) != shard.sha256:
                damaged.append(shard.file)
            on_shard(done)
        if damaged:
            raise UserError(
                f"{self.root}: edited or damaged, {len(damaged)} of {len(self.shards)} shards do not match "
                f"their SHA-256 in {INDEX}: {', '.join(damaged)}"
            )

    def _header(self, shard: Shard) -> dict[str, int]:
        """Where each tensor begins in the file. ``UserError`` if the header is not the one written."""
        path = self.root / shard.file
        try:
            length = int.from_bytes(self._files.read(path, 0, 8), "little")
            if length > MAX_HEADER:
                raise ValueError
            header = json.loads(self._files.read(path, 8, length))
            header.pop("__metadata__", None)
            expected = self.encoding.tensors(shard.samples)
            found = {name: (entry["dtype"], entry["shape"]) for name, entry in header.items()}
            if found != expected:
                raise ValueError
            starts = {}
            for name, (kind, shape) in expected.items():
                start, end = header[name]["data_offsets"]
                size = {"F32": 4, "F16": 2, "I64": 8}[kind] * math.prod(shape)
                if end - start != size or not 0 <= start <= shard.bytes - 8 - length - size:
                    raise ValueError
                starts[name] = 8 + length + start
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise UserError(f"{path}: edited, its header is not the one that was written") from None
        return starts

    def _labels(self, shard: Shard, offset: int) -> np.ndarray:
        labels = np.empty(shard.samples, dtype="<i8")
        self._files.fill(self.root / shard.file, offset, labels)
        if labels.size and not 0 <= labels.min() <= labels.max() < len(self.classes):
            raise UserError(f"{self.root / shard.file}: edited, a label is not among the index's classes")
        return labels.astype(np.int64, copy=False)


def shard_name(number: int) -> str:
    return f"shard-{number:05d}.safetensors"


def is_encoded(root: Path) -> bool:
    """Whether ``mdt-fast encode`` has written, at least partly, this folder."""
    try:
        if any(root.glob("shard-*.safetensors")):
            return True
        with open(root / INDEX, "rb") as file:
            return KIND.encode() in file.read(64)
    except OSError:
        return False


def sign(values: dict[str, Any]) -> str:
    """The text of a JSON file: ``values``, kind and format, and the SHA-256 over them."""
    values = {"kind": KIND, "format": FORMAT, **values}
    return json.dumps({**values, "sha256": _digest(values)}, indent=1) + "\n"


def read_signed(path: Path) -> dict[str, Any]:
    """Read a file made by ``sign``. ``DamagedError``: truncated or edited; ``UserError``: not ours, or
    another format."""
    try:
        values = json.loads(path.read_text())
    except (ValueError, RecursionError):
        raise DamagedError(f"{path}: truncated or edited, it is not JSON") from None
    if not isinstance(values, dict) or values.get("kind") != KIND:
        raise UserError(f"{path}: not written by mdt-fast encode")
    if values.get("format") != FORMAT:
        raise UserError(f"{path}: format {values.get('format')}; this version reads format {FORMAT}")
    signed = values.pop("sha256", None)
    if signed != _digest(values):
        raise DamagedError(f"{path}: edited or damaged, its own SHA-256 does not match")
    return {**values, "sha256": signed}


def _digest(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
