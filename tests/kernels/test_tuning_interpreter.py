"""Tuning in Triton's interpreter at a tiny size: rows are written, wrong results are never timed."""

import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from mdt_fast.errors import UserError
from mdt_fast.kernels.backends import INTERPRETING

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))
import candidates
import ops
import points
import tune
from rows import RowFile, machine

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.skipif(not INTERPRETING, reason="needs TRITON_INTERPRET=1 in the environment"),
]
CPU = torch.device("cpu")


@pytest.fixture
def tuner(monkeypatch: pytest.MonkeyPatch) -> tune.Tuner:
    monkeypatch.setattr(ops, "TOKENS", 16)
    monkeypatch.setattr(ops, "KEPT", 9)
    for model in ops.WIDTHS:
        monkeypatch.setitem(ops.WIDTHS, model, 24)
    monkeypatch.setattr(candidates, "HEADS", 1)
    monkeypatch.setattr("points.WARM_UP", 1)
    rows = RowFile(None, machine(CPU, "python bench/tune.py"))
    return tune.Tuner(rows, [], "sm_90", CPU, None, time.monotonic() + 60, batch=2, repeats=2)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kernel", "shape", "choice"),
    [
        ("ln_modulate_bwd", "32 float32", {"each": 4, "programs": 4}),
        ("gather_tokens_bwd", "32 float32", {"each": 4, "block_k": 128}),
        (
            "rel_attention_bwd_q",
            "64 float32",
            {"block_m": 32, "block_n": 32, "num_warps": 4, "num_stages": 1},
        ),
    ],
)
def test_a_choice_is_timed_against_the_present_one(
    kernel: str, shape: str, choice: dict[str, int], tuner: tune.Tuner
) -> None:
    makers = candidates.calls((kernel, shape), 1, CPU)
    title, make = next(iter(makers.items()))
    tuner.time((kernel, shape), title, make, {0: (choice, {"registers": 32.0})})
    (row,) = tuner.rows.rows
    assert (row["op"], row["shape"], row["point"], row["switches"]) == (kernel, shape, title, choice)
    assert row["metric"] == "ratio", row
    assert row["p50"] > 0
    assert row["registers"] == 32


def test_wrong_results_are_never_timed(tuner: tune.Tuner) -> None:
    def make() -> Callable[[], list[torch.Tensor]]:
        results = iter([1.0, 2.0])
        return lambda: [torch.full((3,), next(results, 1.0))]

    tuner.time(("cfg_step", "4096 float32"), "", make, {0: ({"each": 4}, {"registers": 32.0})})
    (row,) = tuner.rows.rows
    assert row["metric"] == "failed"
    assert "disagrees with the current choice" in row["note"]


def test_a_device_that_is_lost_ends_the_run(tuner: tune.Tuner, monkeypatch: pytest.MonkeyPatch) -> None:
    """The choice that broke it gets a row, so that the next run skips it."""

    def broken(device: torch.device) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(tune, "synchronize", broken)
    call = partial(list, [torch.ones(3)])
    with pytest.raises(UserError, match=r"left the device unusable .*: this choice will be left out"):
        tuner.time(("cfg_step", "4096 float32"), "", lambda: call, {0: ({"each": 4}, {"registers": 32.0})})
    (row,) = tuner.rows.rows
    assert (row["metric"], row["switches"]) == ("failed", {"each": 4})


@pytest.mark.parametrize("kernel", candidates.IN_A_STEP)
def test_backward_kernels_are_timed_as_a_step_calls_them(
    kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ops, "TOKENS", 6)
    monkeypatch.setattr(ops, "KEPT", 3)
    monkeypatch.setattr(ops, "WIDTHS", {"S": 24})
    size = candidates.KERNELS[kernel].size_of(24)
    ((_, make),) = candidates.calls((kernel, f"{size} half"), 1, torch.device("cpu")).items()
    call = make()
    results = call()
    rows = [result.shape[0] for result in results if result.ndim == 2]
    assert 9 in rows  # both passes: six tokens and three
    assert points.difference(call(), results) == 0
