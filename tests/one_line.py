"""The message of a command that is refused."""

import pytest

from mdt_fast.cli import main


def error(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line of error that ``mdt-fast ARGUMENTS`` ends with, without its prefix."""
    capsys.readouterr()
    assert main(list(arguments)) == 2
    line = capsys.readouterr().err
    assert line.startswith("mdt-fast: error: ")
    assert line.count("\n") == 1
    return line.removeprefix("mdt-fast: error: ").rstrip("\n")
