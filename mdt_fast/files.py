"""Writing files so that, whatever happens, a name holds a whole file: the old one or the new one."""

import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Lock

_SETTING = Lock()


@contextmanager
def aside(path: Path) -> Iterator[Path]:
    """A temporary name beside ``path`` to write to; flushed to the disk and renamed when the block is done.

    If the block raises, the temporary file is removed and ``path`` is as it was.
    """
    temporary = _temporary(path)
    try:
        yield temporary
        os.chmod(temporary, 0o666 & ~_umask())  # some libraries make files that only their owner reads
        flush(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def folder_aside(path: Path) -> Iterator[Path]:
    """A new folder beside ``path``, to move from what is complete; it is gone when the block is done.

    What a process that was killed here, or in :func:`aside`, left for ``path`` is removed first.
    """
    remove_leftovers(path.parent, [path.name])
    temporary = _temporary(path)
    temporary.mkdir()
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


LEFTOVER = re.compile(r"\.(.+)\.[0-9a-f]{8}\.partial")


def is_leftover(path: Path, names: Collection[str] | None = None) -> bool:
    """Whether ``path`` is the temporary file or folder of one of ``names`` (None: of any)."""
    match = LEFTOVER.fullmatch(path.name)
    return match is not None and (names is None or match[1] in names)


def remove_leftovers(folder: Path, names: Collection[str] | None = None) -> None:
    """Remove what killed processes left in ``folder``: files and folders of ``names``, or (None) all files.

    Only where no other process writes them: what it has begun would be removed, too.
    """
    for path in folder.glob(".*.partial"):
        if is_leftover(path, names):
            if path.is_file() or path.is_symlink():
                path.unlink(missing_ok=True)
            elif names is not None:
                shutil.rmtree(path, ignore_errors=True)


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")


def flush(path: Path) -> None:
    """Wait until a file's content, or a folder's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _umask() -> int:
    """The process's umask. Where the system does not tell it, it can only be read by setting it, which is all
    threads' then."""
    with suppress(OSError):
        if told := re.search(r"^Umask:\s*([0-7]+)$", Path("/proc/self/status").read_text(), re.MULTILINE):
            return int(told[1], 8)
    with _SETTING:
        mask = os.umask(0o077)
        os.umask(mask)
        return mask
