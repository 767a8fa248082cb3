"""``throughput.py --breakdown``: classes of kernels, and a whole run at toy size."""

from pathlib import Path

import pytest

import breakdown
import throughput
from rows import read


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("nvjet_sm90_tst_192x160_64x4_1x2_h_bz_coopB_NNT", "matmul"),
        ("void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm>", "matmul"),
        ("aten::addmm", "matmul"),
        ("rel_attention_bwd_kv_kernel", "attention"),
        ("void pytorch_flash::flash_fwd_kernel<>", "attention"),
        ("void mdt_fast::(anonymous namespace)::step_kernel<true>(mdt_fast::Table)", "optimiser"),
        ("gate_residual_bwd_kernel", "adaLN"),
        ("bias_gelu_bwd_kernel", "GELU"),
        ("gather_tokens_fwd_kernel", "tokens"),
        ("Memcpy DtoD (Device -> Device)", "copy"),
        ("void at::native::reduce_kernel<128, 4>", "elementwise"),
    ],
)
def test_classes(name: str, expected: str) -> None:
    assert breakdown.class_of(name) == expected


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["train", "sample"])
def test_a_run(mode: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "rows.jsonl"
    flags = ["--breakdown", "--model", "digits", "--batch", "4", "--device", "cpu", "--mode", mode]
    assert throughput.main([*flags, "--providers", "fast,fast-graphs", "--json", str(file)]) == 0
    table = capsys.readouterr().out
    assert all(name in table for name in breakdown.NAMES)
    assert "fast-graphs: skipped: CUDA graphs need a GPU" in table
    rows = read([file])
    found = {row["metric"]: row["p50"] for row in rows if row["provider"] == "fast"}
    shares = [found[f"ms_{name}"] for name in breakdown.NAMES]
    assert sum(shares) == pytest.approx(found["ms"], rel=1e-6)
    assert found["ms_matmul"] > 0
    assert found["ms_attention"] > 0
    assert any(row["metric"] == "skipped" for row in rows)


def test_nothing_measured_is_no_success() -> None:
    flags = ["--breakdown", "--model", "digits", "--batch", "4", "--device", "cpu"]
    assert throughput.main([*flags, "--providers", "fast-graphs"]) == 1


def test_not_with_the_account(capsys: pytest.CaptureFixture[str]) -> None:
    assert throughput.main(["--breakdown", "--account"]) == 2
    assert "--breakdown: not together with --account" in capsys.readouterr().err
