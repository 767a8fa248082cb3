"""Reads pieces of many large files from many threads."""

import os
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..errors import UserError

OPEN_FILES = 256  # a process may open about a thousand files, and other code opens some too


class Files:
    """``read(path, offset, size)`` with a system call that moves no file position, so threads need no lock.

    The ``OPEN_FILES`` most recently used descriptors stay open, because reopening is slow on a network file
    system. A file truncated meanwhile raises ``UserError``, where a memory map would kill the process.
    """

    def __init__(self) -> None:
        self._open: Callable[[Path], _Descriptor] = lru_cache(OPEN_FILES)(_Descriptor)

    def read(self, path: Path, offset: int, size: int) -> bytes:
        """Read ``size`` bytes from ``offset``."""
        data = bytearray(size)
        self.fill(path, offset, data)
        return bytes(data)

    def fill(self, path: Path, offset: int, buffer: Any) -> None:
        """Fill ``buffer`` (contiguous, such as a bytearray or a new array) from ``offset`` on."""
        left = memoryview(buffer).cast("B") if memoryview(buffer).nbytes else memoryview(b"")
        try:
            file = self._open(path)  # hold a reference: another thread may evict it from the cache
            while left:
                count = os.preadv(file.number, [left], offset)
                if count == 0:
                    raise UserError(f"{path}: truncated, it ends before byte {offset + len(left)}")
                left, offset = left[count:], offset + count
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror}") from None


class _Descriptor:
    """An open file, closed when no longer referenced."""

    def __init__(self, path: Path):
        self.number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)
