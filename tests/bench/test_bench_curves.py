"""The statistics of learning curves, on curves whose crossings are known."""

import math

import numpy as np
import pytest

import learning_report
from curves import Band, Curve, coverage, same_within_bands, speedup, targets_of

PLACES = tuple(float(10 * 2**i) for i in range(8))  # 10 to 1280


def power(factor: float, exponent: float = -1.0, places: tuple[float, ...] = PLACES) -> Curve:
    """``factor * place ** exponent``, which reaches a target at ``(factor / target) ** (-1 / exponent)``."""
    return Curve(places, tuple(factor * place**exponent for place in places))


@pytest.mark.parametrize("exponent", [-0.5, -1.0, -2.0])
@pytest.mark.parametrize("place", [10.0, 33.0, 640.0, 1279.0])
def test_a_crossing_of_a_power_is_exact(place: float, exponent: float) -> None:
    curve = power(1000.0, exponent)
    assert curve.crossing(1000.0 * place**exponent) == pytest.approx(place, rel=1e-9)


def test_crossings_at_the_ends() -> None:
    curve = power(100.0)  # 10 at the first place
    assert curve.crossing(11.0) == 10.0  # reached before the first place
    assert math.isinf(curve.crossing(100.0 / 1281))
    assert curve.crossing(100.0 / 1280) == pytest.approx(1280)


def test_only_the_best_so_far_counts() -> None:
    """A distance that rises again does not move the crossing, and a dip counts when it is reached."""
    curve = Curve((1.0, 2.0, 4.0, 8.0), (8.0, 2.0, 6.0, 1.0))
    assert curve.crossing(2.0) == pytest.approx(2.0)
    assert 4.0 < curve.crossing(1.5) < 8.0
    flat = Curve((1.0, 2.0, 3.0), (4.0, 4.0, 4.0))
    assert math.isinf(flat.crossing(3.0))


def test_a_model_that_learns_three_times_as_fast() -> None:
    base = [power(100.0 * wobble) for wobble in (0.9, 1.0, 1.1)]
    other = [power(100.0 / 3 * wobble) for wobble in (0.9, 1.0, 1.1)]
    found = speedup(base, other, 0.5)
    assert found is not None
    assert found.low == pytest.approx(3)
    assert found.high == pytest.approx(3)
    unequal = speedup([power(100.0), power(100.0), power(200.0)], [power(50.0)] * 3, 0.5)
    assert unequal is not None
    assert (unequal.low, unequal.median, unequal.high) == pytest.approx((2, 2, 4))


def test_what_was_not_reached_is_a_bound_and_no_number() -> None:
    fast, slow = power(10.0), power(1000.0)  # at 1280: 0.0078 and 0.78
    assert speedup([slow], [slow], 0.5) is None
    reached = speedup([slow, slow], [fast, fast], 0.5)
    assert reached == Band(math.inf, math.inf, math.inf)
    assert speedup([fast], [slow], 0.5) == Band(0, 0, 0)


@pytest.mark.parametrize(
    ("bases", "others", "median"),
    [
        ("fs", "ff", math.inf),  # 1 and a lower bound: no number in the middle
        ("ff", "fs", 0.0),
        ("fs", "sf", math.nan),  # each reaches it once where the other does not
        ("ffs", "fff", 1.0),
    ],
)
def test_a_median_is_not_made_of_bounds(bases: str, others: str, median: float) -> None:
    curves = {"f": power(10.0), "s": power(1000.0)}  # one reaches 0.5, the other does not
    found = speedup([curves[name] for name in bases], [curves[name] for name in others], 0.5)
    assert found is not None
    assert found.median == pytest.approx(median, nan_ok=True)


def test_a_speedup_and_its_opposite_say_the_same() -> None:
    a, b = [power(100.0), power(200.0)], [power(50.0), power(400.0)]
    found, opposite = speedup(a, b, 0.5), speedup(b, a, 0.5)
    assert found is not None
    assert opposite is not None
    assert found.median == pytest.approx(1)  # twice as fast and half as fast
    assert opposite.median == pytest.approx(1)


def test_what_is_not_finite_is_not_reached() -> None:
    lost = Curve((1.0, 2.0, 4.0), (8.0, math.inf, math.inf))
    assert lost.crossing(8.0) == 1.0
    assert math.isinf(lost.crossing(2.0))
    assert Curve((1.0, 2.0, 4.0), (math.inf, 4.0, 1.0)).crossing(4.0) == 2.0
    assert Curve((1.0, 2.0), (4.0, 0.0)).crossing(1.0) == 2.0
    never = Curve((1.0, 2.0), (math.inf, math.inf))
    assert targets_of([never, power(1.0, places=(1.0, 2.0))], floor=0.1) == []
    late = Curve((1.0, 2.0, 4.0), (math.inf, 4.0, 1.0))
    assert targets_of([late], floor=0.1) == pytest.approx([2.0, 2**0.5, 1.0])


def test_bands() -> None:
    assert Band.of([3.0, 1.0, 2.0]) == Band(1.0, 2.0, 3.0)
    assert coverage(3) == 0.75
    assert coverage(5) == pytest.approx(0.9375)
    assert coverage(1) == 0


def test_bands_that_touch() -> None:
    a = [power(100.0), power(120.0)]
    assert same_within_bands(a, [power(115.0), power(140.0)])
    assert not same_within_bands(a, [power(121.0), power(140.0)])


def test_targets_are_reached_by_every_seed_of_the_base() -> None:
    base = [power(100.0), power(130.0), power(110.0)]
    targets = targets_of(base, floor=0.0)
    assert targets == sorted(targets, reverse=True)
    assert targets[-1] == pytest.approx(130.0 / 1280)
    assert all(math.isfinite(curve.crossing(target)) for curve in base for target in targets)
    assert targets_of(base, floor=1.0)[-1] == 1.0  # below the floor nothing can be told apart
    assert targets_of([Curve((1.0,), (2.0,))], floor=0.0) == [2.0]
    flat = [Curve((1.0, 2.0), (distance, distance)) for distance in (2.0, 3.0)]
    assert targets_of(flat, floor=0.0) == [3.0]


@pytest.mark.parametrize(("points", "shown"), [(1, [0]), (2, [0, 1]), (5, [1, 2, 3, 4]), (9, [2, 4, 6, 8])])
def test_pictures_are_shown_of_as_many_points_as_there_are(points: int, shown: list[int]) -> None:
    figure = pytest.importorskip("matplotlib.figure").Figure()
    learning_report._grids(figure, {"a": np.zeros((points, 2, 1, 8, 8))}, list(range(points)))
    assert [axis.get_title() for axis in figure.axes] == [f"{place} updates" for place in shown]
