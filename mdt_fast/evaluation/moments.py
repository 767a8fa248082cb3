"""Mean and covariance of features that arrive in parts, in float64."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Moments:
    """``mean`` [D] and ``covariance`` [D, D] (divided by N - 1), float64 on the CPU.

    ``count``: the number of samples; None if a file does not give it.
    """

    mean: Tensor
    covariance: Tensor
    count: int | None = None

    @property
    def dim(self) -> int:
        return len(self.mean)


class MomentSum:
    """Accumulates ``Moments`` part by part.

    Parts are centred before they are multiplied, and then merged (Chan, Golub and LeVeque 1979). Unlike
    ``sum(x x') - N mean mean'``, this does not cancel if the mean is large compared with the spread.
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean = torch.zeros(0, dtype=torch.float64)
        self.scatter = torch.zeros(0, 0, dtype=torch.float64)

    def add(self, features_BD: Tensor) -> None:
        """Add a part, of any floating-point dtype and device; the sums are kept on that device."""
        if not len(features_BD):
            return
        part = features_BD.double()
        mean = part.mean(0)
        centred = part - mean
        scatter = centred.T @ centred
        if self.count == 0:
            self.count, self.mean, self.scatter = len(part), mean, scatter
            return
        total = self.count + len(part)
        step = mean - self.mean
        self.mean = self.mean + step * (len(part) / total)
        self.scatter += scatter + torch.outer(step, step) * (self.count * len(part) / total)
        self.count = total

    def result(self) -> Moments:
        """The moments of at least two samples (``ValueError`` otherwise)."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 samples, got {self.count}")
        return Moments(self.mean.cpu(), (self.scatter / (self.count - 1)).cpu(), self.count)


def moments(features_ND: Tensor, rows: int = 4096) -> Moments:
    """``Moments`` of features that are all in memory."""
    total = MomentSum()
    for part in features_ND.split(rows):
        total.add(part)
    return total.result()
