"""A training killed again and again equals an unbroken one; ``make soak`` kills one 20 times."""

from pathlib import Path

import pytest

import soak


@pytest.mark.slow
def test_five_kills_leave_no_trace(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    code, printed = soak.main(["--kills=5", "--warm"]), capsys.readouterr()
    assert code == 0, printed
    *kills, verdict = printed.out.splitlines()
    assert [line.split(",")[0] for line in kills] == [f"kill  {number} of 5" for number in range(1, 6)]
    assert verdict.startswith("the same bit for bit: 30 steps, 5 kills")


def test_a_difference_is_found(tmp_path: Path) -> None:
    """In a tensor, a row, and in what is left behind."""
    from mdt_fast.training import train
    from tiny import tiny

    for name, seed in (("whole", 0), ("same", 0), ("other", 1)):
        train(tiny(steps=2, seed=seed, tensorboard=False), tmp_path / name)
    assert soak.compare(tmp_path / "same", tmp_path / "whole") == []
    wrong = soak.compare(tmp_path / "other", tmp_path / "whole")
    assert "ema/final_layer.linear.weight differs" in wrong
    assert "row of step 2 differs" in wrong
    (tmp_path / "same" / ".loss.png.0123abcd.partial").write_bytes(b"half")
    assert soak.compare(tmp_path / "same", tmp_path / "whole") == ["same: left behind: loss.png"]
