"""Writing files so that, whatever happens, a name holds a whole file: the old one or the new one."""

import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def aside(path: Path) -> Iterator[Path]:
    """A temporary name beside ``path`` to write to; flushed to the disk and renamed when the block is done.

    If the block raises, the temporary file is removed and ``path`` is as it was.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        yield temporary
        os.chmod(temporary, 0o666 & ~_umask())  # some libraries make files that only their owner reads
        flush(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


LEFTOVER = re.compile(r"\..+\.[0-9a-f]{8}\.partial")


def remove_leftovers(folder: Path) -> None:
    """Remove what a process that was killed in :func:`aside` left in ``folder``."""
    for path in folder.glob(".*.partial"):
        if LEFTOVER.fullmatch(path.name) and path.is_file():
            path.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Wait until a file's content, or a folder's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    """The process's umask, which can only be read by setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
