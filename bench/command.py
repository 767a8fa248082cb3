"""Shared parts of the benchmarks' command lines.

User errors are found before anything is measured, take one line and give exit code 2. Ctrl-C keeps the rows
made so far.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch

from mdt_fast.commands.shared import MOST_THREADS
from mdt_fast.errors import UserError, nearest
from rows import Row, RowFile

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class Parser(argparse.ArgumentParser):
    def __init__(self, prog: str, description: str):
        super().__init__(
            prog=prog, description=description, allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


@dataclass
class Kept:
    """The rows of a run, set as soon as they exist, for the message after Ctrl-C."""

    rows: RowFile | None = None


def guarded(name: str, body: Callable[[Kept], int]) -> int:
    """Run ``body`` and return its exit code. A user error or ``OSError`` (a failing disk) gives 2 and Ctrl-C
    gives 130, each with one line on stderr."""
    kept = Kept()
    try:
        return body(kept)
    except (UserError, OSError) as error:
        print(f"{name}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        rows, said = kept.rows, "no rows were kept"
        if rows is not None and rows.path is not None:
            said = f"{len(rows.rows)} rows so far are in {rows.path}"
        print(f"{name}: interrupted; {said}", file=sys.stderr)
        return 130


def conclude(rows: RowFile, plot: Path | None, draw: Callable[[Sequence[Row], Path], bool]) -> None:
    """Draw the picture, if one was requested, and print where everything is."""
    if plot is not None:
        print(f"picture: {plot}" if draw(rows.rows, plot) else "no picture: nothing was measured")
    where = f" appended to {rows.path}" if rows.path else ", not kept (--json FILE keeps them)"
    print(f"{len(rows.rows)} rows{where}")


def add_output_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="append each row to this file as soon as it is made"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the results as this PNG file")


def make_folder(option: str, folder: Path, *, new: bool = False) -> None:
    """Make the folder of an option. Raises ``UserError`` if it cannot be made or, with ``new``, exists."""
    try:
        folder.mkdir(parents=True, exist_ok=not new)
    except OSError as error:
        raise UserError(f"{option}: cannot make {str(folder)!r}: {error.strerror}") from None


def listed(option: str, text: str) -> list[str]:
    """The comma-separated names in ``text``, without repeats."""
    found = [name.strip() for name in text.split(",") if name.strip()]
    if not found:
        raise UserError(f"{option}: got {text!r}, expected one or more names, separated by commas")
    return list(dict.fromkeys(found))


def names(option: str, text: str, allowed: Sequence[str]) -> list[str]:
    """The comma-separated names in ``text``. Raises ``UserError`` if one is not in ``allowed``."""
    found = listed(option, text)
    for name in found:
        if name not in allowed:
            raise UserError(f"{option}: got {name!r}{nearest(name, allowed)}, expected {', '.join(allowed)}")
    return found


def whole(option: str, text: str) -> int:
    """The integer in ``text``, which must be 1 or more."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise UserError(f"{option}: got {text!r}, expected an integer, 1 or more")
    return number


def set_threads(threads: int | None) -> None:
    """Let torch use this many CPU threads, if given. Raises ``UserError`` beyond what ``mdt-fast`` allows."""
    if threads is None:
        return
    if not 1 <= threads <= MOST_THREADS:
        raise UserError(f"--threads: got {threads}, expected 1 to {MOST_THREADS}")
    torch.set_num_threads(threads)


def at_least_one(option: str, value: int | None) -> None:
    if value is not None and value < 1:
        raise UserError(f"{option}: got {value}, expected 1 or more")


def positive_seconds(option: str, value: float | None) -> None:
    if value is not None and not value > 0:
        raise UserError(f"{option}: got {value}, expected a positive number of seconds")


def device(text: str) -> torch.device:
    """The device for ``auto``, ``cpu``, ``cuda`` or ``cuda:N``. Raises ``UserError`` if it is missing."""
    if text == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(text)
    except RuntimeError:
        found = None
    if found is None or found.type not in ("cpu", "cuda"):
        raise UserError(f"--device: got {text!r}, expected auto, cpu, cuda or cuda:N")
    if found.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device: {text!r} requested, but torch finds no CUDA device here")
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"--device: got {text!r}, this machine has cuda:0 to cuda:{torch.cuda.device_count() - 1}"
        )
    return found
