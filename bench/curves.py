"""Learning curves of several seeds, and how much sooner one variant gets somewhere than another.

A curve is the distances found at given places (steps, seconds, FLOPs). Of n seeds the range from the lowest
to the highest holds the median of all seeds with probability ``1 - 2^(1-n)``, whatever their distribution:
75% for three, 94% for five. That range is what is shown as a band.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

AXES = ("step", "seconds", "flops")


@dataclass(frozen=True)
class Curve:
    """What one seed gave: ``places`` in ascending order, the ``distances`` there (0 or more; infinite where
    what was drawn was not finite)."""

    places: tuple[float, ...]
    distances: tuple[float, ...]

    def __post_init__(self) -> None:
        assert len(self.places) == len(self.distances) > 0
        assert list(self.places) == sorted(self.places)

    def crossing(self, target: float) -> float:
        """The first place at which the best distance so far is ``target`` or less; infinite if there is none.

        Between two places the distance is taken as a power of the place, as curves look straight then. A
        curve that begins below the target has its first place: it came there before, nobody knows when.
        """
        best = math.inf
        for i, (place, distance) in enumerate(zip(self.places, self.distances)):
            if distance <= target:
                if i == 0:
                    return place
                before = self.places[i - 1]
                if math.isinf(best) or distance == 0:  # no line of logarithms leads there
                    return place
                # From ``best``, as if it had been reached at ``before``: a rise in between makes it no later.
                part = math.log(best / target) / math.log(best / distance)
                return before * (place / before) ** part
            best = min(best, distance)
        return math.inf


@dataclass(frozen=True)
class Band:
    """The median of some seeds and their lowest and highest; infinite: never reached."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Band":
        return cls(min(values), statistics.median(values), max(values))


def coverage(seeds: int) -> float:
    """With what probability a band of so many seeds holds the median of all."""
    return 1 - 2.0 ** (1 - seeds)


def speedup(base: Sequence[Curve], other: Sequence[Curve], target: float) -> Band | None:
    """How many times sooner ``other`` reaches the target than ``base``, seed by seed; None if of one seed
    neither reached it, so that nothing can be said.

    Where only one of a pair reached it the ratio is a bound: infinite or zero here, never a number made up.
    Of an even number of seeds the median is the geometric mean of the middle two, so that ``base`` and
    ``other`` are treated alike and a bound stays one; NaN between zero and infinity.
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
    """Whether everywhere the bands of two variants, judged at the same places, touch."""
    for mine, theirs in zip(columns(a), columns(b), strict=True):
        if max(min(mine), min(theirs)) > min(max(mine), max(theirs)):
            return False
    return True


def columns(curves: Sequence[Curve]) -> list[tuple[float, ...]]:
    """The distances of all seeds, place by place."""
    return list(zip(*(curve.distances for curve in curves), strict=True))


def targets_of(base: Sequence[Curve], floor: float) -> list[float]:
    """Three distances that tell: the best that every seed of ``base`` reaches, and those at a half and three
    quarters of the way to it (of the logarithm, from where its median begins). ``floor``: real images' own
    distance, below which nothing can be told apart. One where that is no way down; none where a seed was
    never finite."""
    last = max(floor, *(min(curve.distances) for curve in base))
    if math.isinf(last):
        return []
    first = next((m for m in map(statistics.median, columns(base)) if math.isfinite(m)), last)
    if not last < first:
        return [last]
    return [first ** (1 - part) * last**part for part in (0.5, 0.75, 1.0)]
