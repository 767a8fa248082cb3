"""Several learners at a time: one that fails ends the others, and is all that is said."""

import threading
from dataclasses import replace
from pathlib import Path

import pytest

import convergence
from learn import Job
from learners import DIT, SIZES
from mdt_fast.errors import UserError


@pytest.mark.slow
def test_one_that_fails_ends_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = set(threading.enumerate())
    raised: list[threading.ExceptHookArgs] = []
    monkeypatch.setattr(threading, "excepthook", raised.append)
    settings = SIZES["cpu"]
    settings = replace(settings, data=replace(settings.data, source=str(tmp_path / "not there")))
    jobs = [
        Job(
            study="models", variant=DIT, settings=settings, seed=seed, steps=(1,), folder=tmp_path,
            judge=tmp_path / "judge.safetensors", classes=10, threads=1,
        )
        for seed in range(4)
    ]  # fmt: skip
    with pytest.raises(UserError, match="not there"):
        list(convergence.learnt(jobs, 2))
    for thread in set(threading.enumerate()) - before:
        thread.join(timeout=20)
    assert not raised
