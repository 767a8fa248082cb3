"""Learning curves of several seeds, and how much sooner one variant reaches a target than another.

A curve consists of the distances measured at given places (steps, seconds or FLOPs). With n seeds, the range
from the lowest to the highest contains the median of all possible seeds with probability ``1 - 2^(1-n)``,
whatever their distribution: 75% for three, 94% for five. This range is shown as a band.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

AXES = ("step", "seconds", "flops")


@dataclass(frozen=True)
class Curve:
    """The result of one seed: ``places`` in ascending order, and the ``distances`` there, 0 or more (infinite
    if the samples were not finite)."""

    places: tuple[float, ...]
    distances: tuple[float, ...]

    def __post_init__(self) -> None:
        assert len(self.places) == len(self.distances) > 0
        assert list(self.places) == sorted(self.places)

    def crossing(self, target: float) -> float:
        """The first place at which the best distance so far is ``target`` or less; infinite if there is none.

        Between two places the distance is interpolated as a power of the place, because curves look straight
        that way. A curve that starts below the target gets its first place; when it got there is unknown.
        """
        best = math.inf
        for i, (place, distance) in enumerate(zip(self.places, self.distances)):
            if distance <= target:
                if i == 0:
                    return place
                before = self.places[i - 1]
                if math.isinf(best) or distance == 0:  # logarithms cannot interpolate here
                    return place
                # Start from ``best`` as if reached at ``before``, so that a rise in between causes no delay.
                part = math.log(best / target) / math.log(best / distance)
                return before * (place / before) ** part
            best = min(best, distance)
        return math.inf


@dataclass(frozen=True)
class Band:
    """The median, lowest and highest of some seeds; infinite means never reached."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Band":
        return cls(min(values), statistics.median(values), max(values))


def coverage(seeds: int) -> float:
    """The probability that a band of ``seeds`` seeds contains the median of all possible seeds."""
    return 1 - 2.0 ** (1 - seeds)


def speedup(base: Sequence[Curve], other: Sequence[Curve], target: float) -> Band | None:
    """How many times sooner ``other`` reaches the target than ``base``, seed by seed. None if neither reached
    it for some seed, so that nothing can be said.

    If only one of a pair reached it, the ratio is a bound, represented as infinite or zero rather than by a
    made-up number. For an even number of seeds the median is the geometric mean of the middle two, so that
    ``base`` and ``other`` are treated alike and a bound remains one; between zero and infinity it is NaN.
    """
    ratios = []
    for mine, theirs in zip(base, other, strict=True):
        a, b = mine.crossing(target), theirs.crossing(target)
        if math.isinf(a) and math.isinf(b):
            return None
        ratios.append(a / b if math.isfinite(b) else 0.0)
    ratios.sort()
    low, high = ratios[(len(ratios) - 1) // 2], ratios[len(ratios) // 2]
    return Band(ratios[0], low if low == high else math.sqrt(low * high), ratios[-1])


def same_within_bands(a: Sequence[Curve], b: Sequence[Curve]) -> bool:
    """Whether the bands of two variants, judged at the same places, touch everywhere."""
    for mine, theirs in zip(columns(a), columns(b), strict=True):
        if max(min(mine), min(theirs)) > min(max(mine), max(theirs)):
            return False
    return True


def columns(curves: Sequence[Curve]) -> list[tuple[float, ...]]:
    """The distances of all seeds, place by place."""
    return list(zip(*(curve.distances for curve in curves), strict=True))


def targets_of(base: Sequence[Curve], floor: float) -> list[float]:
    """Three informative targets: the best distance that every seed of ``base`` reaches, preceded by those at
    a half and three quarters of the way there (in logarithms, from where its median starts).

    ``floor`` is the distance of real images, below which nothing can be told apart. There is only one target
    if it is not below the start, and none if a seed was never finite.
    """
    last = max(floor, *(min(curve.distances) for curve in base))
    if math.isinf(last):
        return []
    first = next((m for m in map(statistics.median, columns(base)) if math.isfinite(m)), last)
    if not last < first:
        return [last]
    return [first ** (1 - part) * last**part for part in (0.5, 0.75, 1.0)]
