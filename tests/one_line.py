"""What a command that is refused says."""

import pytest

from mdt_fast.cli import main


def error(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that ``mdt-fast ARGUMENTS`` ends with, without its beginning."""
    capsys.readouterr()
    assert main(list(arguments)) == 2
    line = capsys.readouterr().err
    assert line.startswith("mdt-fast: error: ")
    assert line.count("\n") == 1
    return line.removeprefix("mdt-fast: error: ").rstrip("\n")
