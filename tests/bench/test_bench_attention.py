"""Attention with a relative position bias: a whole run at tiny sizes, its rows, and every mistake."""

import re
from pathlib import Path

import pytest
import torch

import attention
import plots
import points
from rows import KEYS, read

FLAGS = ["--tokens", "16", "--heads", "2", "--head-dim", "8", "--device", "cpu"]


def test_a_run_leaves_rows_tables_and_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows_file, picture = tmp_path / "rows.jsonl", tmp_path / "picture.png"
    flags = [*FLAGS, "--repeats", "5", "--providers", "sdpa,sdpa-no-bias", "--json", str(rows_file)]
    assert attention.main([*flags, "--plot", str(picture)]) == 0
    rows = read([rows_file])
    assert all({*KEYS, "op", "shape"} <= set(row) and row["bench"] == "attention" for row in rows)
    for K in (16, 10):
        for mode, factor in (("fwd", 1), ("fwd+bwd", 3.5)):
            flops = factor * 4 * 2 * 2 * K * K * 8
            for provider in ("sdpa-no-bias", "sdpa"):
                found = {
                    row["metric"]: row
                    for row in rows
                    if (row["mode"], row["provider"], row["shape"].get("K", 16)) == (mode, provider, K)
                }
                assert set(found) == {"ms", "tflop_per_s", "ratio"}
                assert found["tflop_per_s"]["p50"] == pytest.approx(flops / 1e9 / found["ms"]["p50"])
                assert (provider == "sdpa-no-bias") == (found["ratio"]["p20"] == found["ratio"]["p80"] == 1.0)
    out = capsys.readouterr().out
    assert "rel_attention · B 2, H 2, L 16, d 8 · float32" in out
    assert "rel_attention · B 2, H 2, L 16, K 10, d 8 · float32" in out
    assert "vs sdpa-no-bias" in out
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert not plots.draw_kernels(rows, tmp_path / "none.png")


@pytest.mark.gpu
def test_our_kernels_agree_and_are_timed_on_a_gpu(tmp_path: Path) -> None:
    rows_file = tmp_path / "rows.jsonl"
    ours = (*attention.TRITON, "triton-packed")
    flags = ["--tokens", "64", "--heads", "2", "--batch", "2", "--repeats", "5", "--device", "cuda"]
    flags += ["--providers", ",".join(["sdpa-no-bias", "sdpa", *ours]), "--json", str(rows_file)]
    assert attention.main(flags) == 0
    rows = read([rows_file])
    assert not [row for row in rows if row["metric"] == "failed"]
    assert {row["provider"] for row in rows if row["metric"] == "ratio"} == {"sdpa-no-bias", "sdpa", *ours}


def test_what_cannot_serve_is_skipped_with_its_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows_file = tmp_path / "rows.jsonl"
    names = "sdpa-no-bias,triton-lookup-recompute,triton-dense-store,triton-packed"
    flags = [*FLAGS, "--masked", "no", "--repeats", "1", "--providers", names, "--json", str(rows_file)]
    assert attention.main(flags) == 0
    skipped = {
        (row["provider"], row["mode"]): row["note"] for row in read([rows_file]) if row["metric"] == "skipped"
    }
    assert skipped.pop(("triton-dense-store", "fwd")) == "the forward pass is that of triton-dense-recompute"
    assert set(skipped) == {(name, mode) for name in names.split(",")[1:] for mode in points.MODES} - {
        ("triton-dense-store", "fwd")
    }
    assert all("CUDA" in reason for reason in skipped.values())
    assert re.search(r"triton-lookup-recompute fwd, .*: skipped: .*CUDA", capsys.readouterr().out)


@pytest.mark.parametrize("provider", ["flex", "xformers", "flash_attn"])
def test_libraries_serve_or_say_why_not(provider: str, tmp_path: Path) -> None:
    rows_file = tmp_path / "rows.jsonl"
    flags = [*FLAGS, "--mode", "fwd", "--masked", "no", "--repeats", "1", "--providers", provider]
    code = attention.main([*flags, "--json", str(rows_file)])
    rows = read([rows_file])
    if code == 0:
        assert "ms" in {row["metric"] for row in rows}
    else:
        assert len(rows) == 1
        assert rows[0]["note"]


def test_a_refusal_is_no_failure(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def refuse(*tensors: object, attention_backend: str, **options: object) -> None:
        raise ValueError(f"attention_backend: {attention_backend!r} cannot serve this call: not installed")

    monkeypatch.setattr(attention, "rel_attention", refuse)
    flags = [*FLAGS, "--mode", "fwd", "--masked", "no", "--repeats", "1", "--providers", "sdpa-no-bias,flex"]
    assert attention.main(flags) == 0
    assert "flex fwd: skipped: not installed\n" in capsys.readouterr().out


def test_the_packed_form_gives_what_the_others_give(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU PyTorch's attention stands in for it: this tests the layouts."""
    packed = attention.rel_attention_qkvpacked

    def served(*tensors: torch.Tensor, attention_backend: str, **options: object) -> torch.Tensor:
        return packed(*tensors, **options, attention_backend="sdpa")

    monkeypatch.setattr(attention, "rel_attention_qkvpacked", served)
    shape = {"B": 2, "H": 3, "L": 16, "K": 9, "d": 8}
    makers = attention.prepare("fwd+bwd", torch.float32, shape, torch.device("cpu"))
    got, want = makers["triton-packed"]()(), makers["sdpa"]()()
    assert [x.shape for x in got] == [x.shape for x in want]
    assert points.difference(got, want) < 1e-6


def test_gradients_that_do_not_fit_are_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**30, 2**30))
    shape = {"B": 2, "H": 16, "L": 4096, "d": 64}
    assert not attention.fits(torch.device("cuda"), shape, torch.bfloat16)
    assert capsys.readouterr().out.startswith("4096 tokens, torch.bfloat16: forward only; ")
    assert attention.fits(torch.device("cuda"), {**shape, "L": 256}, torch.bfloat16)


MISTAKES = {
    "provider": (["--providers", "spda"], "--providers: got 'spda' (did you mean 'sdpa'?), expected"),
    "dtype": (["--dtype", "half"], "--dtype: got 'half', expected float32, float16, bfloat16"),
    "tokens": (["--tokens", "100,200"], "--tokens: got 200, expected squares"),
    "tokens-text": (["--tokens", "many"], "--tokens: got 'many', expected an integer, 1 or more"),
    "head-dim": (["--head-dim", "0"], "--head-dim: got '0', expected an integer, 1 or more"),
    "heads": (["--heads", "1.5"], "--heads: got '1.5', expected an integer, 1 or more"),
    "batch": (["--batch", "-2"], "--batch: got '-2', expected an integer, 1 or more"),
    "masked": (["--masked", "-"], "--masked: got '-', expected no, yes"),
    "mode": (["--mode", "train"], "--mode: got 'train', expected fwd, fwd+bwd"),
    "plot": (["--plot", "/no/such/p.png"], "--plot: cannot write '/no/such/p.png'"),
}  # fmt: skip


@pytest.mark.parametrize(("flags", "message"), MISTAKES.values(), ids=MISTAKES.keys())
def test_mistakes_are_one_line(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert attention.main(flags) == 2
    out, err = capsys.readouterr()
    assert err.startswith(f"attention: error: {message}")
    assert err.count("\n") == 1
    assert out == ""
