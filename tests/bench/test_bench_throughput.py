"""The command: a whole run at tiny sizes, its rows, and every mistake a user can make."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import providers
import session
import steps
import throughput
from mdt_fast.config import ModelConfig
from measure import Timing
from rows import KEYS, read

SHAPE = {"input_size": 8, "patch_size": 2, "in_channels": 1, "hidden_size": 32, "depth": 2, "num_heads": 2}
TINY = ModelConfig(**SHAPE, num_classes=10, decode_layer=0)
FLAGS = ["--model", "digits", "--batch", "2", "--repeats", "2", "--device", "cpu"]


@pytest.fixture
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any preset and factory name becomes a model of a few thousand weights."""
    monkeypatch.setattr(providers, "model_config", lambda name: TINY)


@pytest.mark.usefixtures("_tiny")
def test_a_run_leaves_rows_a_table_and_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows_file, picture = tmp_path / "rows.jsonl", tmp_path / "picture.png"
    flags = [
        *FLAGS,
        "--providers",
        "fast,reference,official",
        "--json",
        str(rows_file),
        "--plot",
        str(picture),
    ]
    assert throughput.main(flags) == 0
    rows = read([rows_file])
    assert all(set(KEYS) <= set(row) for row in rows)
    for mode in ("train", "sample"):
        for provider in ("reference", "fast"):
            found = {row["metric"]: row for row in rows if (row["mode"], row["provider"]) == (mode, provider)}
            expected = {
                "ms",
                "img_per_s",
                "tflop_per_s",
                "peak_share",
                "peak_bytes",
                "ratio",
                "executed_flop_share",
            }
            assert expected <= set(found)
            assert 0 < found["ms"]["p20"] <= found["ms"]["p50"] <= found["ms"]["p80"]
            timed = ("ms", "img_per_s", "tflop_per_s", "peak_share", "ratio")
            assert all(found[metric]["rounds"] == 2 for metric in timed)
            images = 2 if mode == "train" else 2 / steps.SAMPLING_STEPS
            for low, high in (("p20", "p80"), ("p50", "p50"), ("p80", "p20")):
                assert found["img_per_s"][low] == 1e3 * images / found["ms"][high]
                tflop = found["tflop_per_s"][low] * found["ms"][high]
                assert tflop == pytest.approx(found["tflop_per_s"]["p50"] * found["ms"]["p50"])
            assert found["ratio"]["p50"] is None
            assert found["ratio"]["note"] == "too few rounds (2; a ratio takes 5)"
        skipped = [row for row in rows if (row["mode"], row["metric"]) == (mode, "skipped")]
        assert [row["provider"] for row in skipped] == ["official"]
        assert "--official PATH" in skipped[0]["note"]
    assert [row["op"] for row in rows if row["mode"] == "fwd"] == ["matmul", "matmul"]
    out = capsys.readouterr().out
    assert "train · digits · batch 2 · float32" in out
    assert "scikit-learn's digits" in out
    assert "reference, fast: no ratio: too few rounds (2; a ratio takes 5)" in out
    assert f"{len(rows)} rows appended to" in out.replace("\n", " ")
    assert picture.exists()


@pytest.mark.usefixtures("_tiny")
def test_the_ratio_is_taken_round_by_round(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both medians are 1 s, but in most rounds ``fast`` takes half of the reference's time."""
    reference, fast = [1.0, 1.0, 1.0, 4.0, 4.0], [0.5, 1.0, 1.0, 2.0, 2.0]

    def turns(turns: dict, *args: object, **kwargs: object) -> dict[str, Timing]:
        seconds = {"reference": reference, "fast": fast}
        return {name: Timing(seconds.get(name, [1.0] * 5), list(range(5))) for name in turns}

    monkeypatch.setattr(session, "take_turns", turns)
    rows_file = tmp_path / "rows.jsonl"
    flags = [*FLAGS, "--mode", "sample", "--providers", "reference,fast", "--json", str(rows_file)]
    assert throughput.main(flags) == 0
    row = next(r for r in read([rows_file]) if (r["provider"], r["metric"]) == ("fast", "ratio"))
    assert (row["p20"], row["p50"], row["p80"], row["rounds"]) == (1.0, 2.0, 2.0, 5)
    out = capsys.readouterr().out
    assert "2.00x (1.00-2.00)" in out
    assert "machine busy: times scatter; look at the spread, not the ratio\n" in out


@pytest.mark.usefixtures("_tiny")
def test_sizes_are_picked_and_explained(capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        throughput.main(["--providers", "fast", "--time-limit", "16", "--mode", "sample", "--device", "cpu"])
        == 0
    )
    out = capsys.readouterr().out
    assert "probe: " in out
    assert "model: MDTv2_S_2" in out
    assert "batch: " in out
    assert "(aim: no more than 1 s)\n" in out, "a reason is printed on one line"


@pytest.mark.usefixtures("_tiny")
def test_compiled_providers_that_do_not_fit_are_explained(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--batch", "1", "--repeats", "1", "--mode", "train", "--device", "cpu"]
    monkeypatch.setattr(providers.doctor, "cpp_compiler", lambda: None)
    assert throughput.main(flags) == 0
    assert "reference-compiled, fast-compiled: skipped: torch.compile on the CPU needs a C++ compiler" in (
        " ".join(capsys.readouterr().out.split())
    )


@pytest.mark.usefixtures("_tiny")
def test_a_provider_that_disagrees_is_reported_and_not_timed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    build = providers.Modules._build

    def wrong(self: providers.Modules, implementation: str) -> torch.nn.Module:
        module = build(self, implementation)
        if implementation == "fast":
            image = module.image
            module.image = lambda *args: 1.01 * image(*args)
        return module

    monkeypatch.setattr(providers.Modules, "_build", wrong)
    rows_file = tmp_path / "rows.jsonl"
    flags = [*FLAGS, "--mode", "train", "--providers", "reference,fast", "--json", str(rows_file)]
    assert throughput.main(flags) == 0
    fast = [row for row in read([rows_file]) if row["provider"] == "fast"]
    assert [row["metric"] for row in fast] == ["failed"]
    assert "disagrees with the reference: losses" in fast[0]["note"]


@pytest.mark.usefixtures("_tiny")
def test_a_provider_that_fails_does_not_stop_the_others(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    build = providers.Modules._build

    def broken(self: providers.Modules, implementation: str) -> torch.nn.Module:
        if implementation == "fast":
            raise RuntimeError("out of memory\nand a long trace")
        return build(self, implementation)

    monkeypatch.setattr(providers.Modules, "_build", broken)
    assert throughput.main([*FLAGS, "--mode", "sample", "--providers", "reference,fast"]) == 0
    assert "fast: failed: RuntimeError: out of memory" in capsys.readouterr().out
    assert throughput.main([*FLAGS, "--mode", "sample", "--providers", "fast"]) == 1


@pytest.mark.usefixtures("_tiny")
def test_ctrl_c_keeps_the_rows_made(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(session.Session, "memory", interrupt)
    rows_file = tmp_path / "rows.jsonl"
    assert throughput.main([*FLAGS, "--providers", "reference", "--json", str(rows_file)]) == 130
    rows = read([rows_file])
    assert "img_per_s" in {row["metric"] for row in rows}
    assert f"interrupted; {len(rows)} rows so far are in" in capsys.readouterr().err


@pytest.mark.usefixtures("_tiny")
@pytest.mark.parametrize("complete", [0, 2])
def test_ctrl_c_keeps_the_complete_rounds_of_the_case(
    complete: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(turns: dict, device: torch.device, **options: object) -> dict[str, Timing]:
        if "matmul" not in turns:
            return timed(turns, device, **options)
        calls: list[int] = []

        def matmul(index: int) -> None:
            calls.append(index)
            if len(calls) > complete:
                raise KeyboardInterrupt
            turns["matmul"](index)

        return timed(turns | {"matmul": matmul}, device, **{**options, "repeats": 9, "least": 9})

    timed = session.take_turns
    monkeypatch.setattr(session, "take_turns", interrupted)
    rows_file = tmp_path / "rows.jsonl"
    assert throughput.main([*FLAGS, "--mode", "sample", "--json", str(rows_file)]) == 130
    kept = [row["rounds"] for row in read([rows_file]) if row["metric"] == "ms"]
    assert kept[:2] == ([2, 2] if complete else [])
    assert f"interrupted; {len(read([rows_file]))} rows so far are in" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_all_steps_agree(dtype: str, tmp_path: Path) -> None:
    """MDT v1 and DiT, at a tiny size, in every mode."""
    for family in ("mdt", "dit"):
        config = ModelConfig(**{**vars(TINY), "family": family, "decode_layer": 1})
        for mode in ("train", "sample"):
            case = steps.Case("tiny", config, mode, 2, getattr(torch, dtype), torch.device("cpu"))
            run = session.Session(throughput.RowFile(None, {}), lambda text: None)
            images = throughput.inputs.load("synthetic", config, 2)
            modules = providers.Modules(config, case.device, None)
            found = {name: session.Result(name) for name in ("reference", "fast")}
            agreeing = run.agreeing(case, list(found), modules, images, found, float("inf"))
            assert list(agreeing) == ["reference", "fast"], [one.notes for one in found.values()]


MISTAKES = {
    "model": (["--model", "MDTv2_XL2"], "--model: unknown model 'MDTv2_XL2' (did you mean 'MDTv2_XL_2'?)"),
    "provider": (["--providers", "fas"], "--providers: unknown provider 'fas' (did you mean 'fast'?)"),
    "mode": (["--mode", "trian"], "--mode: got 'trian' (did you mean 'train'?), expected train, sample"),
    "dtype": (["--dtype", "bfloat6"], "--dtype: got 'bfloat6' (did you mean 'bfloat16'?)"),
    "batch": (["--batch", "0"], "--batch: got '0', expected an integer, 1 or more"),
    "batch-text": (["--batch", "four"], "--batch: got 'four'"),
    "repeats": (["--repeats", "0"], "--repeats: got 0, expected 1 or more"),
    "threads": (["--threads", "5000"], "--threads: got 5000, expected 1 to 1024"),
    "repeats-text": (["--repeats", "x"], "argument --repeats: invalid int value: 'x'"),
    "time-limit": (["--time-limit", "-1"], "--time-limit: got -1.0"),
    "device": (["--device", "gpu"], "--device: got 'gpu', expected auto, cpu, cuda or cuda:N"),
    "data": (["--data", "/no/such/folder"], "--data: no folder '/no/such/folder'"),
    "json": (["--json", "/no/such/folder/rows.jsonl"], "--json: cannot write '/no/such/folder/rows"),
    "plot": (["--plot", "/no/such/folder/p.png"], "--plot: cannot write '/no/such/folder/p.png'"),
    "official": (["--official", "/no/such"], "--official: no file '/no/such/masked_diffusion/models.py'"),
    "option": (["--modle", "x"], "unrecognized arguments: --modle x"),
    "own": (["--account", "--providers", "fast"], "--providers: not together with --account of training"),
    "empty": (["--providers", ","], "--providers: got ',', expected one or more names"),
}  # fmt: skip


@pytest.mark.parametrize(("flags", "message"), MISTAKES.values(), ids=MISTAKES.keys())
def test_mistakes_are_one_line(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert throughput.main(flags) == 2
    out, err = capsys.readouterr()
    assert err.startswith(f"throughput: error: {message}")
    assert err.count("\n") == 1
    assert out == ""


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_cuda_where_there_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert throughput.main(["--device", "cuda"]) == 2
    assert "torch finds no CUDA device here" in capsys.readouterr().err


def test_folders_of_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (12, 9), (250, 10, 10)).save(tmp_path / name / "1.png")
    for channels in (1, 3, 4, 5):
        config = ModelConfig(**{**vars(TINY), "in_channels": channels})
        images = throughput.inputs.load(str(tmp_path), config, 3)
        assert images.x_BCSS.shape == (3, channels, 8, 8)
        assert images.labels_B.tolist() == [0, 1, 0]
        assert images.x_BCSS.abs().max() <= 1
    (tmp_path / "a" / "2.png").write_bytes(b"not a picture")
    assert throughput.main(["--data", str(tmp_path), "--batch", "3"]) == 2
    assert "cannot read image" in capsys.readouterr().err


def test_digits_without_scikit_learn_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    images = throughput.inputs.load("digits", TINY, 2)
    assert images.what.startswith("synthetic noise (the digits come with scikit-learn")
    assert images.x_BCSS.shape == (2, 1, 8, 8)


def test_the_script_runs_from_any_directory(tmp_path: Path) -> None:
    command = [sys.executable, throughput.__file__, "--mode", "none"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "throughput: error: --mode: got 'none', expected train, sample\n"


@pytest.mark.parametrize("mode", ["train", "sample"])
def test_speed_of_a_tiny_step(benchmark, mode: str) -> None:
    case = steps.Case("tiny", TINY, mode, 2, torch.float32, torch.device("cpu"))
    run = session.Session(throughput.RowFile(None, {}), lambda text: None)
    provider = providers.make("fast", providers.Modules(TINY, case.device, None))
    step = run.step(case, provider, throughput.inputs.load("synthetic", TINY, 2), {})
    benchmark.pedantic(step, args=(0,), rounds=3, warmup_rounds=1)


@pytest.mark.usefixtures("_tiny")
def test_switches_are_turned_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows_file = tmp_path / "rows.jsonl"
    flags = [*FLAGS, "--providers", "reference,fast", "--json", str(rows_file), "--turn"]
    picture = tmp_path / "picture.png"
    assert (
        throughput.main([*flags, "fused_mlp,stored_scores", "--mode", "train", "--plot", str(picture)]) == 0
    )
    assert picture.exists()
    assert "· fast without fused_mlp with stored_scores" in capsys.readouterr().out
    assert throughput.main([*flags, "fused_mlp", "--breakdown"]) == 0
    said = {(row["bench"], row["provider"]) for row in read([rows_file]) if "op" not in row}
    assert said == {
        ("throughput", "reference"), ("throughput", "fast without fused_mlp with stored_scores"),
        ("breakdown", "reference"), ("breakdown", "fast without fused_mlp"),
    }  # fmt: skip

    assert throughput.main([*flags, "flash", "--mode", "train"]) == 2
    assert "--turn: got 'flash', expected packed, " in capsys.readouterr().err
    assert throughput.main([*flags, "packed", "--account"]) == 2
    assert "--turn: not together with --account" in capsys.readouterr().err
    assert throughput.main([*FLAGS, "--providers", "reference", "--turn", "packed"]) == 2
    assert "--turn: applies to the fast model, which --providers lacks" in capsys.readouterr().err


@pytest.mark.usefixtures("_tiny")
@pytest.mark.parametrize(("least", "rounds"), [(5.0, 5), (0.0, 1)])
def test_short_rounds_are_enough_for_a_ratio(
    least: float, rounds: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even if the time is up before the first one."""
    monkeypatch.setattr(session, "LEAST_SECONDS", least)
    rows_file = tmp_path / "rows.jsonl"
    flags = [
        "--model",
        "digits",
        "--batch",
        "2",
        "--device",
        "cpu",
        "--mode",
        "train",
        "--time-limit",
        "1e-3",
    ]
    assert throughput.main([*flags, "--providers", "reference,fast", "--json", str(rows_file)]) == 0
    timed = [row for row in read([rows_file]) if row["metric"] == "ms"]
    assert [row["rounds"] >= rounds for row in timed] == [True, True]
    assert rounds > 1 or [row["rounds"] for row in timed] == [1, 1]


@pytest.mark.usefixtures("_tiny")
def test_providers_one_at_a_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows_file = tmp_path / "rows.jsonl"
    flags = [*FLAGS, "--mode", "train", "--repeats", "5", "--apart", "--json", str(rows_file)]
    assert throughput.main([*flags, "--providers", "reference,fast,fast-graphs"]) == 0
    assert "fast-graphs: skipped: CUDA graphs need a GPU" in capsys.readouterr().out
    rows = [row for row in read([rows_file]) if row["provider"] in ("reference", "fast")]
    timed = {row["provider"]: row for row in rows if row["metric"] == "ms"}
    assert {name: row["rounds"] for name, row in timed.items()} == {"reference": 5, "fast": 5}
    assert [row["provider"] for row in rows if row["metric"] == "ratio"] == ["reference"]  # with itself
    assert throughput.main([*flags, "--account"]) == 2
    assert "--apart: not together with --account or --breakdown" in capsys.readouterr().err


@pytest.mark.usefixtures("_tiny")
@pytest.mark.parametrize("implementation", ["reference", "fast"])
def test_blocks_are_compiled_one_by_one_on_the_same_weights(
    implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs: list[int] = []

    def compiled(function, **options):  # type: ignore[no-untyped-def]
        return compile_(function, **options, backend=lambda module, _: graphs.append(1) or module.forward)

    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", compiled)
    modules = providers.Modules(TINY, torch.device("cpu"), None)
    plain = providers.make(implementation, modules)
    ours = providers.make(f"{implementation}-blocks-compiled", modules)
    assert ours.implementation == implementation
    assert ours.compiled
    for mode in ("train", "sample"):
        case = steps.Case("tiny", TINY, mode, 2, torch.float32, torch.device("cpu"))
        inputs = throughput.inputs.load("synthetic", TINY, 2)
        expected = steps.step_of(case, plain, inputs, [10]).outcome()
        graphs.clear()
        assert steps.disagreement(steps.step_of(case, ours, inputs, [10]), expected)[1] is None
        assert len(graphs) >= 2  # full and masked, encoder and decoder: several, but not one per block
    assert not any(m._compiled_call_impl for m in ours.module.modules())  # shared blocks stay plain


def test_numbers_of_kept_tokens_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(providers, "model_config", lambda name: TINY)
    draw = steps.MaskPlan.from_noise
    monkeypatch.setattr(
        steps.MaskPlan, "from_noise", lambda noise, n, **more: seen.append(n) or draw(noise, n, **more)
    )
    assert throughput.main([*FLAGS, "--mode", "train", "--providers", "fast", "--lengths", "1"]) == 0
    assert len(set(seen)) == 1
    assert throughput.main([*FLAGS, "--mode", "train", "--providers", "fast", "--lengths", "0"]) == 2
