"""Rows: one JSON object per measurement, each on its own line, appended when made and never rewritten.

Keys: ``bench``, ``model`` or ``op``, ``provider``, ``mode``, ``batch`` or ``shape``, ``dtype``, ``metric``,
``unit``, ``p20``, ``p50``, ``p80``, ``switches``, ``device``, ``driver``, ``torch``, ``triton``,
``commit``, ``time``, ``command``; ``rounds`` if something was timed; ``note`` for remarks. A provider that
could not be measured has a row with the metric ``skipped`` or ``failed``, whose ``note`` says why.
"""

import argparse
import datetime
import json
import shlex
import subprocess
import sys
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

from mdt_fast import doctor
from mdt_fast.errors import UserError
from mdt_fast.kernels.backends import tf32
from measure import MIN_ROUNDS

Row = dict[str, Any]

KEYS = (
    "bench",
    "provider",
    "mode",
    "dtype",
    "metric",
    "unit",
    "p20",
    "p50",
    "p80",
    "switches",
    "device",
    "driver",
    "torch",
    "triton",
    "commit",
    "time",
    "command",
)
"""The keys of every row; in addition there are ``model`` and ``batch``, or ``op`` and ``shape``."""


SETTINGS = ("--lengths", "--data", "--steps")


def machine(device: torch.device, command: str) -> Row:
    """The keys that are the same in every row of a run."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{doctor.cpu_name()}, {torch.get_num_threads()} threads"
    return {
        "device": name,
        "driver": doctor.nvidia_driver() if device.type == "cuda" else None,
        "torch": torch.__version__,
        "triton": doctor.distribution_version("triton"),
        "commit": commit(),
        "command": command,
    }


def commit(folder: Path | None = None) -> str | None:
    """The checked-out commit, with ``-dirty`` if tracked files (other than rows) were changed; None outside a
    git checkout."""
    git = ["git", "-C", str(folder or Path(__file__).parent)]
    try:
        head = subprocess.run(
            [*git, "rev-parse", "--short=10", "HEAD"], capture_output=True, text=True, timeout=10
        )
        status = subprocess.run(
            [
                *git,
                "status",
                "--porcelain",
                "--untracked-files=no",
                "--",
                ":/",
                ":(top,exclude)bench/results",
            ],
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    if head.returncode != 0:
        return None
    return head.stdout.strip() + ("-dirty" if status.stdout.strip() else "")


def few(row: Row) -> bool:
    """Whether a row has fewer rounds than a ratio needs."""
    return bool(row.get("rounds", MIN_ROUNDS) < MIN_ROUNDS)


def mode_of(row: Row) -> str:
    """The row's mode; ``sample ddim`` for another sampler than ddpm, whose rows are another case."""
    mode, sampler = str(row.get("mode")), row.get("switches", {}).get("sampler", "ddpm")
    return mode if sampler == "ddpm" else f"{mode} {sampler}"


def settings(row: Row) -> tuple[str, ...]:
    """What the row's command sets that is in no other key and changes the numbers; "" for each default."""
    return _settings(str(row["command"]))


@cache
def _settings(command: str) -> tuple[str, ...]:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for option in SETTINGS:
        parser.add_argument(option, default="")
    try:
        found, _ = parser.parse_known_args(shlex.split(command))
    except (ValueError, SystemExit):  # a command of another program
        return ("",) * len(SETTINGS)
    return tuple(vars(found).values())


class RowFile:
    """The rows of one run, kept in ``rows`` and, if ``path`` is given, appended to that file one by one.

    The file is opened when this object is made, so that an unwritable path raises ``UserError`` before
    anything is measured. Existing content is preserved.
    """

    def __init__(self, path: Path | None, common: Row):
        self.path, self.common = path, common
        self.rows: list[Row] = []
        if path is None:
            return
        try:
            with path.open("ab+") as file:
                file.seek(0, 2)
                torn = file.tell() > 0 and (file.seek(-1, 2), file.read(1))[1] != b"\n"
                if torn:  # a run was killed mid-line: separate the rest from our first row
                    file.write(b"\n")
        except OSError as error:
            raise UserError(f"--json: cannot write {str(path)!r}: {error.strerror}") from None

    def add(self, spread: Sequence[float | None] = (None, None, None), **fields: Any) -> Row:
        """Make a row from ``fields``, the machine's keys and a spread (p20, p50, p80), and write it. On a
        GPU, float32 whose products may use TF32 is recorded as ``tf32``, a case distinct from float32."""
        if fields.get("dtype") == "float32" and self.common.get("driver") and tf32():
            fields["dtype"] = "tf32"
        p20, p50, p80 = spread
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        row = {**fields, "p20": p20, "p50": p50, "p80": p80, **self.common, "time": now}
        self.rows.append(row)
        if self.path is not None:
            with self.path.open("a") as file:
                file.write(json.dumps(row) + "\n")
        return row


def read(paths: Iterable[Path]) -> list[Row]:
    """All rows of some files, in order. ``UserError`` names the file and line of anything that is not a row.

    A line left unfinished by a killed run is skipped and reported on stderr.
    """
    rows = []
    for path in paths:
        try:
            text = path.read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"cannot read {str(path)!r}: {getattr(error, 'strerror', None) or error}"
            ) from None
        lines = text.splitlines()
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                last = number == len(lines) and not text.endswith("\n")
                # After "}", it ends where more was to come: a row is cut behind an object or in a string.
                cut = error.pos >= len(line) or error.msg.startswith("Unterminated string")
                if line.startswith("{") and (last or cut or not line.endswith("}")):
                    print(f"{path}:{number}: skipped an unfinished row", file=sys.stderr)
                    continue
                raise UserError(f"{path}:{number}: not a row: {error.msg}") from None
            if not isinstance(row, dict) or not set(KEYS) <= set(row):
                missing = ", ".join(sorted(set(KEYS) - set(row))) if isinstance(row, dict) else "everything"
                raise UserError(f"{path}:{number}: not a row: lacks {missing}")
            rows.append(row)
    return rows
