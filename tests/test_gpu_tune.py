"""Tuning on the GPU at hand: rows for two kernels, resumed, and nothing written unless asked for."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.gpu


@pytest.mark.slow
def test_choices_are_timed_once(tmp_path: Path) -> None:
    rows, data = tmp_path / "rows.jsonl", ROOT / "kernels" / "tuned.json"
    before = data.read_text()
    asked = [
        "--ops",
        "gather_tokens_fwd,gather_tokens_bwd",
        "--top",
        "2",
        "--repeats",
        "5",
        "--batch",
        "4",
    ]
    line = [sys.executable, str(ROOT / "bench" / "tune.py"), *asked, "--json", str(rows)]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    first = rows.read_text().splitlines()
    assert sum('"metric": "ratio"' in row for row in first) >= 8
    assert not any('"metric": "failed"' in row for row in first), done.stdout
    again = subprocess.run(line, capture_output=True, text=True)
    assert again.returncode == 0, again.stdout + again.stderr
    assert rows.read_text().splitlines() == first
    assert data.read_text() == before
