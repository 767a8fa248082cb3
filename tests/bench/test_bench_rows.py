"""Rows: their keys, their file, and the tables and pictures made from them."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import formats
import plots
import report
from mdt_fast.errors import UserError
from rows import KEYS, RowFile, commit, machine, read

COMMON = machine(torch.device("cpu"), "python bench/throughput.py")
README = f"# title\n\n{report.BEGIN}\nold\n{report.END}\nend\n"


def fields(**changes: object) -> dict:
    row = {
        "bench": "throughput",
        "model": "digits",
        "provider": "fast",
        "mode": "train",
        "batch": 4,
        "dtype": "float32",
        "metric": "ms",
        "unit": "ms/step",
        "switches": {},
    }
    return row | changes


def case_rows(path: Path, **changes: object) -> list[dict]:
    file = RowFile(path, COMMON)
    file.add((9.0, 10.0, 11.0), **fields(rounds=7, **changes))
    file.add((380.0, 400.0, 420.0), **fields(metric="img_per_s", unit="img/s", **changes))
    file.add((None, 0.25, None), **fields(metric="peak_share", unit="1", **changes))
    file.add((None, 2**30, None), **fields(metric="peak_bytes", unit="B", **changes))
    return file.rows


def test_rows_are_appended_and_have_all_keys(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    case_rows(path)
    case_rows(path, provider="reference")
    rows = read([path])
    assert len(rows) == 8
    assert all(set(KEYS) <= set(row) for row in rows)
    assert rows[0]["p20"] == 9.0
    assert rows[0]["time"].endswith("+00:00")


def test_a_torn_last_line_is_kept_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"bench": "thr')
    RowFile(path, COMMON).add(**fields())
    lines = path.read_text().splitlines()
    assert lines[0] == '{"bench": "thr'
    assert json.loads(lines[1])["provider"] == "fast"
    assert [row["provider"] for row in read([path])] == ["fast"]
    assert capsys.readouterr().err.endswith("rows.jsonl:1: skipped an unfinished row\n")


@pytest.mark.parametrize("end", ["", "\n", None], ids=["last", "ended", "in the middle"])
@pytest.mark.parametrize("cut", ['"note": "took {x}', '"shape": {"B": 2}', '"switches": {}'])
def test_a_torn_line_may_end_in_a_brace(
    cut: str, end: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "rows.jsonl"
    RowFile(path, COMMON).add(**fields())
    with path.open("a") as file:
        file.write(f'{{"bench": "throughput", {cut}{end or ""}')
    if end is None:
        RowFile(path, COMMON).add(**fields())
    assert len(read([path])) == (2 if end is None else 1)
    assert capsys.readouterr().err.endswith("rows.jsonl:2: skipped an unfinished row\n")


@pytest.mark.parametrize("text", ["[]", '{"bench": "throughput"}', '{"bench": throughput}', "nonsense"])
def test_what_is_not_a_row_is_named_by_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(f"\n{text}\n")
    with pytest.raises(UserError, match=r"rows\.jsonl:2: not a row"):
        read([path])


def test_a_path_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--json: cannot write"):
        RowFile(tmp_path / "no" / "such" / "folder.jsonl", COMMON)
    with pytest.raises(UserError, match="cannot read"):
        read([tmp_path / "missing.jsonl"])


def test_no_commit_outside_of_git(tmp_path: Path) -> None:
    assert commit(tmp_path) is None


def test_table_has_numbers_and_origin(tmp_path: Path) -> None:
    text = report.markdown(case_rows(tmp_path / "rows.jsonl"))
    assert "| train | digits, 4, float32 | `fast` | 400 | 10.0 (9.00-11.0) | 7 | 25% | 1.00 GiB |" in text
    for origin in (COMMON["device"], COMMON["torch"], "`python bench/throughput.py`"):
        assert origin in text
    assert "guided steps" not in text
    assert "guided steps" in report.markdown(case_rows(tmp_path / "rows.jsonl", mode="sample"))


def test_each_sampler_has_lines_of_its_own(tmp_path: Path) -> None:
    rows = [
        row
        for sampler in ("ddpm", "ddim")
        for row in case_rows(tmp_path / f"{sampler}.jsonl", mode="sample", switches={"sampler": sampler})
    ]
    text = report.markdown(rows)
    assert "| sample | digits, 4" in text
    assert "| sample ddim | digits, 4" in text
    assert "guided steps" in text


def test_ratio_with_its_spread_unless_the_latest_run_has_none(tmp_path: Path) -> None:
    rows = case_rows(tmp_path / "rows.jsonl")
    file = RowFile(None, COMMON)
    file.add((0.9, 0.98, 1.04), **fields(metric="ratio", unit="1"))
    assert "| 0.98x (0.90-1.04) |" in report.markdown(rows + file.rows)
    file.add(**fields(metric="ratio", unit="1", note="too few rounds"))
    assert "0.98x" not in report.markdown(rows + file.rows)


def op_rows(bench: str, **changes: object) -> list[dict]:
    """Rows of one point: time, rates, ratio and, first, the copy that sets its roof."""
    file = RowFile(None, COMMON)
    common = {
        "bench": bench, "op": "ln_modulate", "provider": "fast", "mode": "fwd",
        "shape": {"B": 2, "L": 256, "D": 384}, "dtype": "float32", "switches": {}, "rounds": 9,
    } | changes  # fmt: skip
    file.add((1.0, 2.0, 3.0), **common | {"op": "copy", "provider": "torch"}, metric="gb_per_s", unit="GB/s")
    file.add((0.09, 0.1, 0.11), **common, metric="ms", unit="ms")
    file.add((30.0, 40.0, 50.0), **common, metric="gb_per_s", unit="GB/s")
    file.add((1.0, 2.5, 3.0), **common, metric="tflop_per_s", unit="TFLOP/s")
    file.add((0.7, 0.84, 0.9), **common, metric="roof_share", unit="1")
    file.add((1.5, 1.75, 1.8), **common, metric="ratio", unit="1")
    return file.rows


def test_table_of_ops() -> None:
    rows = op_rows("kernels") + op_rows("kernels", provider="eager", mode="fwd+bwd")
    rows += [row | {"p50": 0.2, "p80": 0.3} for row in rows if row["metric"] == "ms"][:1]
    lines = report.markdown(rows).splitlines()
    op, rates = "| `ln_modulate` | B 2, L 256, D 384, float32 |", "40.0 | 2.50 | 84% | 1.75x (1.50-1.80) |"
    assert lines[2:4] == [
        f"{op} fwd | `fast` | 200 (90.0-300), scattered | {rates}",
        f"{op} fwd+bwd | `eager` | 100 (90.0-110) | {rates}",
    ]
    assert not any("copy`" in line for line in lines)
    assert "`python bench/throughput.py`" in lines[-1]


def test_table_of_attention() -> None:
    rows = []
    for provider in ("sdpa-no-bias", "triton-lookup-store"):
        for sizes in ({"B": 8, "L": 1024}, {"B": 32, "L": 256}, {"B": 32, "L": 256, "K": 153}):
            for d in (72, 64):
                shape = {"H": 16, **sizes, "d": d}
                rows += op_rows("attention", op="rel_attention", provider=provider, shape=shape)
    rows += op_rows(
        "attention", op="rel_attention", mode="fwd+bwd", shape={"B": 8, "H": 16, "L": 1024, "d": 64}
    )
    lines = report.markdown(rows).splitlines()
    tokens = ["256 tokens, batch 32", "256 tokens, 153 kept, batch 32", "1024 tokens, batch 8"]
    assert lines[0] == f"| mode | heads, dtype | provider | {' | '.join(tokens)} |"
    cell = "2.50 (1.75x)"
    assert lines[2:7] == [
        f"| fwd | 16 of 64, float32 | `sdpa-no-bias` | {cell} | {cell} | {cell} |",
        f"| fwd | 16 of 64, float32 | `triton-lookup-store` | {cell} | {cell} | {cell} |",
        f"| fwd | 16 of 72, float32 | `sdpa-no-bias` | {cell} | {cell} | {cell} |",
        f"| fwd | 16 of 72, float32 | `triton-lookup-store` | {cell} | {cell} | {cell} |",
        f"| fwd+bwd | 16 of 64, float32 | `fast` |  |  | {cell} |",
    ]


def test_tables_stand_in_order_and_can_be_chosen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.jsonl"
    shape = {"B": 2, "H": 2, "L": 16, "d": 8}
    rows = op_rows("attention", op="rel_attention", shape=shape) + op_rows("kernels")
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    case_rows(path)
    assert report.main([str(path)]) == 0
    out = capsys.readouterr().out
    assert out.index("| mode | model") < out.index("| op | shape") < out.index("| mode | heads")
    assert report.main([str(path), "--bench", "kernels"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("| op | shape")
    assert "heads" not in out
    assert report.main([str(path), "--bench", "kernel"]) == 2
    assert "--bench: got 'kernel' (did you mean 'kernels'?)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("benches", "said"), [(None, "nothing was"), (["kernels"], "nothing of kernels was")]
)
def test_rows_without_measurements(benches: list[str] | None, said: str) -> None:
    rows = [row | {"p50": None} for row in op_rows("kernels")]
    with pytest.raises(UserError, match=f"{said} measured in these rows"):
        report.markdown(rows, benches)


def test_numbers_are_written_alike() -> None:
    assert [formats.number(x) for x in (0.02, 0.0197, 9, 10, 99.96, 1234.5)] == (
        ["0.0200", "0.0197", "9.00", "10.0", "100", "1,234"]
    )
    assert [formats.memory(x * 2**20) for x in (36.25, 1023, 1024)] == ["36.2 MiB", "1,023 MiB", "1.00 GiB"]
    assert formats.ratio((1.0, 1.0, 1.0)) == "1.00x"


def test_the_latest_measurement_counts(tmp_path: Path) -> None:
    rows = case_rows(tmp_path / "rows.jsonl")
    newer = [{**row, "p50": 2 * row["p50"]} for row in rows]
    assert "| 800 | 20.0 " in report.markdown(rows + newer)


def test_readme_between_the_markers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    case_rows(tmp_path / "rows.jsonl")
    readme = tmp_path / "README.md"
    readme.write_text(README)
    assert report.main([str(tmp_path / "rows.jsonl"), "--readme", str(readme)]) == 0
    text = readme.read_text()
    assert text.startswith("# title\n\n<!-- bench:begin -->\n| mode |")
    assert text.endswith("<!-- bench:end -->\nend\n")
    assert "old" not in text
    readme.write_text("no markers")
    assert report.main([str(tmp_path / "rows.jsonl"), "--readme", str(readme)]) == 2
    assert "lacks the markers" in capsys.readouterr().err
    assert readme.read_text() == "no markers"


def test_picture(tmp_path: Path) -> None:
    rows = case_rows(tmp_path / "rows.jsonl")
    assert plots.draw(rows, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    assert not plots.draw([row for row in rows if row["metric"] == "ms"], tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_picture_over_batches(tmp_path: Path) -> None:
    """Rows of a single batch give no picture."""
    rows = case_rows(tmp_path / "rows.jsonl")
    assert not plots.draw_batches(rows, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()
    assert plots.draw_batches([*rows, *({**row, "batch": 64} for row in rows)], tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("draw", "rows"),
    [
        (plots.draw_kernels, op_rows("kernels") + op_rows("kernels", dtype="bfloat16")),
        (plots.draw_attention, op_rows("attention", provider="sdpa", shape={"H": 2, "L": 64, "d": 8})),
    ],
    ids=["kernels", "attention"],
)
def test_pictures_of_ops(draw: Callable[..., bool], rows: list[dict], tmp_path: Path) -> None:
    assert draw(rows, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    assert not draw([row for row in rows if row["metric"] == "ms"], tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_picture_says_memory_as_the_table_does() -> None:
    axis = pytest.importorskip("matplotlib.figure").Figure().subplots()
    row = {"p20": None, "p50": 36.25 * 2**20, "p80": None}
    plots._bars(axis, {"fast": row}, "peak memory, MiB", formats.memory, scale=2**20)
    assert [text.get_text() for text in axis.texts] == [" 36.2 MiB"]
    assert [bar.get_width() for bar in axis.patches] == [36.25]


def test_picture_target(tmp_path: Path) -> None:
    plots.check_target(tmp_path / "picture.png")
    assert not (tmp_path / "picture.png").exists()
    for bad in (tmp_path / "picture.jpg", tmp_path / "no" / "picture.png"):
        with pytest.raises(UserError, match="--plot"):
            plots.check_target(bad)


def test_float32_by_tf32_is_another_case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU where TF32 is allowed float32 is called tf32; half types keep their names."""
    monkeypatch.setattr("rows.tf32", lambda: True)
    for driver, dtype, called in (
        ("580.1", "float32", "tf32"), ("580.1", "bfloat16", "bfloat16"), (None, "float32", "float32")
    ):  # fmt: skip
        row = RowFile(None, COMMON | {"driver": driver}).add(**fields(dtype=dtype))
        assert row["dtype"] == called
    monkeypatch.setattr("rows.tf32", lambda: False)
    assert RowFile(None, COMMON | {"driver": "580.1"}).add(**fields())["dtype"] == "float32"


def test_a_folder_for_pictures_that_is_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    case_rows(tmp_path / "rows.jsonl")
    assert report.main([str(tmp_path / "rows.jsonl"), "--plots", str(tmp_path / "rows.jsonl")]) == 2
    assert "report: error: --plots: cannot make" in capsys.readouterr().err


def test_settings_are_cases_of_their_own_within_a_commit() -> None:
    def at(commit: str, options: str, p50: float) -> dict:
        common = COMMON | {"commit": commit, "command": f"python bench/throughput.py {options}"}
        file = RowFile(None, common)
        for metric, unit in (("ms", "ms/step"), ("img_per_s", "img/s")):
            file.add((p50, p50, p50), **fields(metric=metric, unit=unit, rounds=7))
        return file.rows

    rows = [
        *at("a", "--lengths 2", 1),
        *at("a", "", 2),
        *at("a", "--data=photos", 3),
        *at("a", "--json x", 4),
    ]
    text = report.markdown(rows)
    assert [n for n in (1, 2, 3, 4) if f"| {n}.00 | {n}.00 (" in text] == [1, 3, 4]
    text = report.markdown(rows + at("b", "--steps 2", 5))
    assert [n for n in range(1, 6) if f"| {n}.00 | {n}.00 (" in text] == [5]


def test_times_that_scatter_are_marked(tmp_path: Path) -> None:
    rows = case_rows(tmp_path / "rows.jsonl")
    assert "cattered" not in report.markdown(rows)
    (row,) = (row for row in rows if row["metric"] == "ms")
    row["p80"] = 1.31 * row["p20"]
    text = report.markdown(rows)
    assert "| 10.0 (9.00-11.8), scattered |" in text
    assert text.endswith("Scattered: the 80th percentile is above 1.3 times the 20th, as on a busy machine.")
