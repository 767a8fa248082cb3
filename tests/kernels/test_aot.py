"""Every kernel compiles for its GPUs without spills; no GPU is needed."""

import importlib.util
import json
import subprocess
import sys
from collections import Counter, defaultdict
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from mdt_fast.kernels.aot import ARCHITECTURES, compile_cases, unset_registers

SCRIPT = Path(__file__).parents[2] / "bench" / "kernels.py"
sys.path.insert(0, str(SCRIPT.parent))
import aot  # noqa: E402
import aot_csrc  # noqa: E402

MATRIX = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCMMA", "gfx942": "MFMA"}
"""What matrix products in half types must compile to: wgmma on Hopper, tcgen05 on Blackwell."""
NVIDIA = [arch for arch in ARCHITECTURES if arch.startswith("sm_")]
EVERY = 8  # one in eight of AMD's kernels: `bench/kernels.py --aot` compiles all of them
PRODUCTS = {
    "rel_attention_fwd_kernel",
    "rel_attention_bwd_q_kernel",
    "rel_attention_bwd_kv_kernel",
    "rel_attention_bwd_bias_kernel",
}


pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The rows of one run for all NVIDIA architectures."""
    file = tmp_path_factory.mktemp("aot") / "rows.jsonl"
    done = run("--aot", "--arch", ",".join(NVIDIA), "--json", str(file))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 of them spill, read what was never written, or fail" in done.stdout
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("arch", NVIDIA)
def test_no_kernel_spills(arch: str, compiled: list[dict[str, Any]]) -> None:
    rows = [row for row in compiled if row["arch"] == arch and row["provider"] == "triton"]
    spills = [row for row in rows if row["metric"] == "spill_bytes"]
    assert len(spills) >= 240
    assert all(row["p50"] == 0 for row in spills)
    assert all(0 < row["p50"] <= 512 for row in rows if row["metric"] == "registers")
    if arch == "sm_80":  # GPUs with less shared memory use its choices, too (8.6, 8.9, 12.x)
        shared = [row["p50"] for row in rows if row["metric"] == "shared_bytes"]
        assert len(shared) == len(spills)
        assert max(shared) <= 99 * 1024

    def of(metric: str) -> list[dict[str, Any]]:
        return [row for row in rows if row["metric"] == metric and row["dtype"] == "bf16"]

    gather = {"rel_attention_bwd_gather_kernel"} if arch != "sm_100" else set()  # 16 rows there: mma.sync
    assert all(row["p50"] > 0 for row in of(MATRIX[arch]) if row["kernel"] in PRODUCTS | gather)
    matrix: Counter[tuple[str, str]] = Counter()  # float32 products that may use TF32
    for row in rows:
        if "tf32" in row["shape"] and row["metric"] in ("HMMA", "HGMMA", "UTCMMA"):
            matrix[row["kernel"], row["shape"]] += row["p50"]
    assert len(matrix) == len(PRODUCTS) * 3 + 2  # heads of 64, 72 and 128; with dS stored, 64 and 72
    assert all(matrix.values())
    wide: Counter[tuple[str, str]] = Counter()  # loads of 16 bytes
    for row in of("LDG.128") + of("LDGSTS.128"):
        wide[row["kernel"], row["shape"]] += row["p50"]
    assert not {kernel for (kernel, _), loads in wide.items() if loads < 2}


@pytest.mark.slow
@pytest.mark.parametrize("arch", NVIDIA)
def test_no_cuda_kernel_spills(arch: str, compiled: list[dict[str, Any]]) -> None:
    """csrc/, by nvcc: no spills, a block's registers fit, the optimiser's kernels load 16 bytes at a time."""
    if aot_csrc.nvcc() is None:
        pytest.skip("needs nvcc (CUDA_HOME, or pip install nvidia-cuda-nvcc)")
    kernels: defaultdict[str, dict[str, float]] = defaultdict(dict)
    for row in compiled:
        if row["arch"] == arch and row["provider"] == "csrc":
            kernels[row["kernel"]][row["metric"]] = row["p50"]
    threads = {"mask_plan_kernel<f, 1024, 4>": 1024, "step_kernel<0>": 256, "step_kernel<1>": 256}
    assert threads.keys() < kernels.keys()
    assert len(kernels) == 11
    for name, numbers in kernels.items():
        assert numbers["spill_bytes"] == numbers["stack_bytes"] == 0, name
        assert numbers["shared_bytes"] <= 48 * 1024, name
        assert numbers["registers"] * threads.get(name, 256) <= 65536, name
    for name in ("step_kernel<0>", "step_kernel<1>", "sumsq_kernel"):
        assert kernels[name]["LDG.128"] >= 2, name


@pytest.mark.slow
def test_kernels_compile_for_amd_without_spills() -> None:
    arch = "gfx942"
    rooms = [import_module(f"mdt_fast.kernels.{room}.aot") for room in aot.ROOMS]
    cases = [case for room in rooms for case in room.cases(arch)][::EVERY]
    assert {case.kernel.__name__ for case in cases} > {"rel_attention_fwd_kernel", "ln_modulate_fwd_kernel"}
    for case, numbers in zip(cases, compile_cases(cases, arch), strict=True):
        assert isinstance(numbers, dict), (case.label, numbers)
        assert numbers["spill_bytes"] == 0, case.label
        if case.kernel.__name__ in PRODUCTS and "bf16" in case.dtypes.values():
            assert numbers[MATRIX[arch]] > 0, case.label


def test_registers_that_were_never_written_are_found() -> None:
    """As ptxas 12.8 compiled it (the UIADD3 should read UR10), and as it should be."""
    wrong = """
        USHF.R.U32.HI UR10, URZ, 0x4, UR44 ; /* 0x1 */
        UMOV UR11, 0xc0000010 ;
        UIADD3 UR42, UP0, UR42, 0x20, URZ ;
        @!P0 UIADD3.X UR43, UR11, URZ, URZ, UP0, !UPT ;
        LDG.E R4, desc[UR4][R2.64] ;
        HGMMA.64x16x16.F32 R88, R32, gdesc[UR8].tnspB, R88 ;
        HGMMA.64x16x16.F32 R88, R32, gdesc[UR40].tnspB, R88, gsb0 ;
    """
    starts = "R2UR UR44, R3 ;\nULDC.64 UR4, c[0x0][0x208] ;\n"
    assert unset_registers(starts + wrong) == ["UIADD3 UR42, UP0, UR42, 0x20, URZ"]
    assert unset_registers(starts + wrong.replace("UR42, 0x20", "UR10, 0x20")) == []
    assert unset_registers("HGMMA.64x64x16.F32 R24, gdesc[UR16], RZ, !UPT") == [
        "HGMMA.64x64x16.F32 R24, gdesc[UR16], RZ, !UPT"
    ]


@pytest.mark.slow
def test_what_does_not_compile_is_told_beside_the_rest() -> None:
    """The results come in the order of the cases."""
    good = next(import_module("mdt_fast.kernels.bias_gelu.aot").cases("sm_90"))
    bad = replace(good, dtypes={**good.dtypes, "x_ptr": "*nonsense"})
    first, second, third = compile_cases([good, bad, good], "sm_90")
    assert isinstance(first, dict)
    assert first == third
    assert first["registers"] > 0
    assert isinstance(second, Exception)


def test_unknown_architecture() -> None:
    done = run("--aot", "--arch", "sm_91")
    assert done.returncode == 2
    assert done.stderr == (
        "kernels: error: --arch: unknown 'sm_91' (did you mean 'sm_90'?); "
        "known: sm_80, sm_90, sm_100, gfx942\n"
    )
