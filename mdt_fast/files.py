"""Atomic file writes: whatever happens, a path holds a complete file, either the old one or the new one."""

import hashlib
import os
import re
import secrets
import shutil
import tempfile
import tokenize
import zipfile
import zlib
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Lock

_SETTING = Lock()


@contextmanager
def aside(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path`` to write to; it is flushed to disk and renamed after the block.

    If the block raises, the temporary file is removed and ``path`` is unchanged.
    """
    temporary = _temporary(path)
    try:
        yield temporary
        os.chmod(temporary, 0o666 & ~_umask())  # some libraries create files that only their owner can read
        flush(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def folder_aside(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside ``path``, from which to move complete files; removed after the block.

    Leftovers for ``path`` of a process that was killed here, or in :func:`aside`, are removed first.
    """
    remove_leftovers(path.parent, [path.name])
    temporary = _temporary(path)
    temporary.mkdir()
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def writable_folder(path: Path) -> set[str]:
    """Make ``path``, unless it exists, and check that files can be written in it; returns the names in it,
    except those that begin with a dot. ``OSError`` if that fails."""
    path.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=path, prefix="."):
        return {inside.name for inside in path.iterdir() if not inside.name.startswith(".")}


def resolved(path: Path) -> Path:
    """``path``, absolute and without links. Unlike ``Path.resolve``, a loop of links is no error."""
    return Path(os.path.realpath(path))


def dead_link(path: Path) -> Path | None:
    """``path``, or the nearest folder above it, if that is a link to nothing (or to itself); else None."""
    above = *path.parents, *path.absolute().parents
    return next((p for p in (path, *above) if p.is_symlink() and not p.exists()), None)


DAMAGED = (
    OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error,
    SyntaxError, tokenize.TokenError,  # a header is parsed as Python
    NotImplementedError, RuntimeError,  # a compression that does not exist, a password
)  # fmt: skip
"""What NumPy and zipfile raise for a .npy or .npz that was damaged after it was written."""

LEFTOVER = re.compile(r"\.(.+)\.[0-9a-f]{8}\.partial")


def is_leftover(path: Path, names: Collection[str] | None = None) -> bool:
    """Whether ``path`` is a temporary file or folder for one of ``names`` (None: for any)."""
    match = LEFTOVER.fullmatch(path.name)
    return match is not None and (names is None or match[1] in names)


def remove_leftovers(folder: Path, names: Collection[str] | None = None) -> None:
    """Remove leftovers of killed processes in ``folder``: files and folders of ``names``; None: all files.

    Call this only if no other process is writing them, because its temporary files would be removed too.
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
    """Flush a file's content, or a folder's entries, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _umask() -> int:
    """The process's umask. If the system does not report it, it can only be read by setting it briefly, which
    affects all threads."""
    with suppress(OSError):
        if told := re.search(r"^Umask:\s*([0-7]+)$", Path("/proc/self/status").read_text(), re.MULTILINE):
            return int(told[1], 8)
    with _SETTING:
        mask = os.umask(0o077)
        os.umask(mask)
        return mask
