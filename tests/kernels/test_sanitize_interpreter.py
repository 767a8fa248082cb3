"""The calls that compute-sanitizer inspects reach every Triton kernel; in the interpreter, at fewer sizes."""

import sys
from pathlib import Path

import pytest

from mdt_fast.kernels.backends import INTERPRETING

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))
import sanitize

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.slow,  # all kernels, in the interpreter
    pytest.mark.skipif(not INTERPRETING, reason="needs TRITON_INTERPRET=1 in the environment"),
]


def test_every_kernel_is_reached(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name, size in {"B": 2, "L": 9, "K": 4, "D": 20, "H": 1, "G": 3, "HEAD_DIMS": (24,)}.items():
        monkeypatch.setattr(sanitize, name, size)
    assert sanitize.main(["--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "28 of 28 Triton kernels ran" in out
    assert "optim FusedAdan, second float32: ran" in out
