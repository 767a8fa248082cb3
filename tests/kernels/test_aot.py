"""Every Triton kernel compiles for the GPUs it is for, without spills; no GPU is needed."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from mdt_fast.kernels.aot import ARCHITECTURES

SCRIPT = Path(__file__).parents[2] / "bench" / "kernels.py"

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_no_kernel_spills(arch: str, tmp_path: Path) -> None:
    done = run("--aot", "--arch", arch, "--json", str(tmp_path / "rows.jsonl"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 of them spill or fail" in done.stdout
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    spills = [row for row in rows if row["metric"] == "spill_bytes"]
    assert len(spills) >= 40
    assert all(row["p50"] == 0 and row["arch"] == arch for row in spills)
    assert all(0 < row["p50"] <= 255 for row in rows if row["metric"] == "registers")
    if arch.startswith("sm_"):  # memory-bound kernels in bfloat16 move 16 bytes at a time
        wide = [row for row in rows if row["metric"] == "LDG.128" and row["dtype"] == "bf16"]
        assert all(row["p50"] >= 2 for row in wide)


def test_unknown_architecture() -> None:
    done = run("--aot", "--arch", "sm_91")
    assert done.returncode == 2
    assert done.stderr == (
        "kernels: error: --arch: unknown 'sm_91' (did you mean 'sm_90'?); "
        "known: sm_80, sm_90, sm_100, gfx942\n"
    )
