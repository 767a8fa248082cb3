"""Turns, quantiles, memory."""

import argparse
import time
import weakref
from typing import Any

import pytest
import torch

import points
from measure import Copy, Matmul, WarmClock, op_clock, peak_bytes, rates, spread, storage_bytes, take_turns
from rows import RowFile

CPU = torch.device("cpu")


def test_providers_take_turns_with_the_same_indices() -> None:
    calls: list[tuple[str, int]] = []
    steps = {name: lambda i, name=name: calls.append((name, i)) for name in "ab"}
    timings = take_turns(steps, CPU, repeats=2, inner=2)
    assert calls == [("a", 0), ("a", 1), ("b", 0), ("b", 1), ("a", 2), ("a", 3), ("b", 2), ("b", 3)]
    assert [len(timings[name].seconds) for name in "ab"] == [2, 2]
    assert timings["a"].indices == [0, 2]
    del calls[:]
    timings = take_turns(steps, CPU, repeats=2, again={"b": 2})
    assert calls == [("a", 0), ("b", 0), ("b", 0), ("a", 1), ("b", 1), ("b", 1)]
    assert timings["b"].indices == [0, 1]


def test_a_turn_s_seconds_are_a_step_s() -> None:
    steps = {name: lambda i: time.sleep(0.01) for name in "ab"}
    timings = take_turns(steps, CPU, repeats=3, inner=2, again={"b": 3})
    assert all(0.01 <= min(timing.seconds) < 0.018 for timing in timings.values())


def test_shuffled_turns_follow_each_other_in_every_order() -> None:
    calls: list[str] = []
    steps = {name: lambda i, name=name: calls.append(name) for name in "abc"}
    timings = take_turns(steps, CPU, repeats=20, shuffle=True)
    rounds = {tuple(calls[i : i + 3]) for i in range(0, 60, 3)}
    assert len(rounds) == 6
    assert all(sorted(order) == ["a", "b", "c"] for order in rounds)
    assert all(len(timing.seconds) == 20 for timing in timings.values())


def test_a_step_that_fails_keeps_nothing_from_the_others() -> None:
    """Neither its own frames nor those of the error's cause keep anything."""
    held: list[weakref.ref] = []

    def inner() -> None:
        mine = torch.empty(10)
        held.append(weakref.ref(mine))
        raise ValueError("no memory")

    def failing(index: int) -> None:
        mine = torch.empty(10)
        held.append(weakref.ref(mine))
        try:
            inner()
        except ValueError:
            raise RuntimeError("no memory, either") from None

    seen: list[int] = []

    def other(index: int) -> None:
        seen.append(sum(reference() is not None for reference in held))

    timings = take_turns({"failing": failing, "other": other}, CPU, repeats=2)
    assert isinstance(timings["failing"].error, RuntimeError)
    assert len(held) == 2
    assert seen == [0, 0]


def test_an_op_on_a_cpu_is_timed_by_its_second_call() -> None:
    clock, sleeps = op_clock(CPU), iter([0.2, 0.01])
    assert isinstance(clock, WarmClock)
    assert 0.01 <= clock(lambda: time.sleep(next(sleeps))) < 0.2
    assert not clock.late


def test_a_call_that_its_launches_held_up_is_counted() -> None:
    class Clock:
        late = False

        def __call__(self, call: object) -> float:
            self.late = not self.late
            return 1.0

    assert take_turns({"a": print}, CPU, repeats=5, clock=Clock())["a"].late == 3


def test_a_copy_reads_half_and_writes_half() -> None:
    copy = Copy(CPU, 1000)
    copy.source.fill_(7)
    copy()
    assert copy.bytes == 1000
    assert copy.target.tolist() == [7] * 500


@pytest.mark.gpu
def test_a_cold_clock_sees_the_kernel_and_not_the_host() -> None:
    device = torch.device("cuda")
    clock, x = op_clock(device), torch.zeros(2**26, device=device)
    clock(x.zero_)
    assert 1e-5 < clock(x.zero_) < 1e-2
    clock(lambda: time.sleep(0.1))
    assert clock.late


def test_one_that_fails_drops_out_and_the_others_go_on() -> None:
    def fail(index: int) -> None:
        if index == 1:
            raise RuntimeError("no more memory")

    timings = take_turns({"bad": fail, "good": lambda i: None}, CPU, repeats=4)
    assert str(timings["bad"].error) == "no more memory"
    assert len(timings["bad"].seconds) == 1
    assert len(timings["good"].seconds) == 4


def test_no_round_begins_after_the_deadline_but_the_first() -> None:
    steps = {"a": lambda i: None, "b": lambda i: None}
    for more, rounds in (({}, 1), ({"least": 4}, 4), ({"least": 12}, 9)):
        timings = take_turns(steps, CPU, repeats=9, deadline=time.monotonic() - 1, **more)
        assert [len(timings[name].seconds) for name in "ab"] == [rounds, rounds]


def test_spread() -> None:
    assert spread([7.0]) == (7.0, 7.0, 7.0)
    assert spread([5.0, 1.0, 2.0, 3.0, 4.0, 0.0]) == pytest.approx((1.0, 2.5, 4.0))


def test_rates_are_the_times_turned_round() -> None:
    assert rates(8.0, (1.0, 2.0, 4.0)) == (2.0, 4.0, 8.0)


def test_peak_bytes_counts_what_is_held_at_once() -> None:
    def step(index: int) -> None:
        for _ in range(3):
            a = torch.ones(250_000)
            b = torch.ones(250_000)
            del a, b

    assert 2_000_000 <= peak_bytes(step, CPU) < 2_010_000


def test_storage_is_counted_once() -> None:
    x = torch.zeros(10)
    assert storage_bytes([x, x[:5], x.view(2, 5), torch.zeros(1)]) == 44


def test_matmul_keeps_its_best_rate() -> None:
    matmul = Matmul(CPU, torch.float32)
    best = matmul.best
    assert best > 0
    assert matmul.rate(0.01) <= matmul.best
    assert matmul.best >= best


def test_matmul_rate_is_the_best_of_the_bursts_in_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    matmul = Matmul(CPU, torch.float32)
    matmul.best, bursts = 0.0, iter([0.05, 0.001, *[0.05] * 1000])
    monkeypatch.setattr(Matmul, "__call__", lambda self, index: time.sleep(next(bursts)))
    start = time.monotonic()
    assert matmul.rate(0.2) > matmul.flops / 0.05
    assert 0.2 <= time.monotonic() - start < 2


def test_speed_of_a_small_matmul(benchmark) -> None:
    a = torch.randn(64, 64)
    benchmark(torch.mm, a, a)


def test_compiling_takes_no_rounds_away() -> None:
    """A point whose time is up before it is timed still gets its rounds, until the overall deadline."""

    def prepare(device: torch.device) -> dict[str, Any]:
        time.sleep(0.05)
        call = lambda: [torch.ones(1)]  # noqa: E731
        return {"eager": lambda: call, "fast": lambda: call}

    point = points.Point(
        bench="kernels", op="op", mode="fwd", shape={"D": 1}, dtype=torch.float32, prepare=prepare,
        base="eager", oracle="eager",
    )  # fmt: skip
    args = argparse.Namespace(
        device="cpu", mode="fwd", dtype="float32", providers="eager,fast", repeats=7, threads=None,
        time_limit=None,
    )  # fmt: skip
    request = points.Request(args, ("eager", "fast"), time_limits={"cpu": 60.0})
    rounds = []
    for wait in (60.0, 0.02):
        rows = RowFile(None, {})
        now = time.monotonic()
        points.Session(rows, request).run(point, now + 0.01, now + wait)
        rounds.append({row["rounds"] for row in rows.rows if row["metric"] == "ms"})
    assert rounds == [{7}, {1}]
