"""Read ``.npz`` files member by member: headers first, images in parts, without unpickling."""

import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from ..errors import UserError
from ..files import DAMAGED


@dataclass(frozen=True)
class Header:
    """An array's header, as NumPy reads it."""

    shape: tuple[int, ...]
    fortran: bool
    dtype: np.dtype


class Npz:
    """The arrays of a ``.npz`` by name. Raises ``UserError``, beginning with ``what``, for a bad file."""

    def __init__(self, path: Path, what: str):
        self.path, self.what = path, what
        self.headers: dict[str, Header] = {}
        try:
            with zipfile.ZipFile(path) as archive:
                for info in archive.infolist():
                    if not info.filename.endswith(".npy"):
                        continue
                    with archive.open(info) as member:
                        header = _read_header(member)
                        size = int(np.prod(header.shape, dtype=object)) * header.dtype.itemsize
                        if info.file_size - member.tell() != size:
                            raise ValueError(f"{info.filename} is not as long as its header says")
                    self.headers[info.filename.removesuffix(".npy")] = header
        except DAMAGED as error:
            raise UserError(f"{what}: cannot read {str(path)!r} as .npz: {error}") from None

    def array(self, name: str, ndim: int) -> np.ndarray:
        """A whole numeric array of ``ndim`` dimensions, as float64."""
        header = self.headers[name]
        if header.dtype.kind not in "fiu" or len(header.shape) != ndim:
            raise UserError(
                f"{self.what}: {name} in {str(self.path)!r} is {header.dtype} {list(header.shape)}; numbers "
                f"of {ndim} dimension{'s' * (ndim > 1)} are needed"
            )
        try:
            with np.load(self.path, allow_pickle=False) as arrays:
                values = arrays[name].astype(np.float64)
        except DAMAGED as error:
            raise UserError(f"{self.what}: cannot read {name} in {str(self.path)!r}: {error}") from None
        if not np.isfinite(values).all():
            raise UserError(f"{self.what}: {name} in {str(self.path)!r} has values that are not finite")
        return values

    def parts(self, name: str, rows: int) -> Iterator[np.ndarray]:
        """The array in order, ``rows`` along its first axis at a time; only one part is in memory."""
        header = self.headers[name]
        stride = int(np.prod(header.shape[1:])) * header.dtype.itemsize
        try:
            with zipfile.ZipFile(self.path) as archive, archive.open(f"{name}.npy") as member:
                _read_header(member)
                for start in range(0, header.shape[0], rows):
                    count = min(rows, header.shape[0] - start)
                    part = np.frombuffer(member.read(count * stride), header.dtype)
                    yield part.reshape(count, *header.shape[1:])
        except DAMAGED as error:
            raise UserError(f"{self.what}: {name} in {str(self.path)!r} is damaged: {error}") from None


def _read_header(member: IO[bytes]) -> Header:
    version = np.lib.format.read_magic(member)
    if version == (1, 0):
        header = Header(*np.lib.format.read_array_header_1_0(member))
    elif version == (2, 0):
        header = Header(*np.lib.format.read_array_header_2_0(member))
    else:
        raise ValueError(f"array format {version} is not known")
    if header.dtype.hasobject:
        raise ValueError("it holds Python objects, which are not read")
    return header
