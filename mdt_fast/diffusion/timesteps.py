"""Choose the timesteps of a training batch, with importance weights that keep the expected loss unchanged.

Timesteps are drawn from NumPy's global state unless a ``rng`` is given: ``np.random.seed`` then gives the
published code's timesteps.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import UserError

Rng = np.random.Generator | np.random.RandomState


class UniformSampler:
    """Every timestep is equally likely, and all weights are 1."""

    def __init__(self, num_timesteps: int, *, rng: Rng | None = None) -> None:
        if num_timesteps < 1:
            raise UserError(f"num_timesteps: got {num_timesteps}, expected 1 or more")
        self.num_timesteps = num_timesteps
        self.rng: Any = np.random if rng is None else rng

    def weights(self) -> NDArray[np.float64]:
        """Relative probability of every timestep, float64 [num_timesteps]."""
        return np.ones(self.num_timesteps)

    def sample(self, batch_size: int, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        """Timesteps, int64 [B], and loss weights, float32 [B]: 1 / (num_timesteps * probability)."""
        weights = self.weights()
        probabilities = weights / weights.sum()
        t = self.rng.choice(self.num_timesteps, size=(batch_size,), p=probabilities)
        importance = 1 / (self.num_timesteps * probabilities[t])
        return torch.as_tensor(t).long().to(device), torch.as_tensor(importance).float().to(device)


class LossSecondMomentSampler(UniformSampler):
    """Draws timesteps in proportion to sqrt(E[loss^2]) over each timestep's most recent losses.

    Uniform until every timestep has ``history_per_term`` losses; after that, a mixture with ``uniform_prob``
    of uniform. Source: Nichol and Dhariwal 2021, section 3.3.
    """

    def __init__(
        self,
        num_timesteps: int,
        history_per_term: int = 10,
        uniform_prob: float = 0.001,
        *,
        rng: Rng | None = None,
    ) -> None:
        super().__init__(num_timesteps, rng=rng)
        if history_per_term < 1:
            raise UserError(f"history_per_term: got {history_per_term}, expected 1 or more")
        if not 0 <= uniform_prob <= 1:
            raise UserError(f"uniform_prob: got {uniform_prob}, expected 0 to 1")
        self.history_per_term = history_per_term
        self.uniform_prob = uniform_prob
        self.losses = np.zeros((num_timesteps, history_per_term))
        self.counts = np.zeros(num_timesteps, dtype=np.int64)

    def weights(self) -> NDArray[np.float64]:
        if (self.counts < self.history_per_term).any():
            return super().weights()
        weights = np.sqrt((self.losses**2).mean(axis=1))
        if not weights.any():
            return super().weights()
        weights *= (1 - self.uniform_prob) / weights.sum()
        return weights + self.uniform_prob / self.num_timesteps

    def update(self, t: Tensor, losses: Tensor) -> None:
        """Record the unweighted ``losses`` [B] of timesteps ``t`` [B], replacing a timestep's oldest loss.

        With several processes, each can keep its own history; for a shared one, gather both tensors first.
        """
        if t.shape != losses.shape or t.ndim != 1:
            raise UserError(
                f"losses: got {list(losses.shape)} for t {list(t.shape)}, expected one per timestep"
            )
        steps, values = t.tolist(), losses.detach().tolist()
        if steps and not 0 <= min(steps) <= max(steps) < self.num_timesteps:
            raise UserError(
                f"t: got values from {min(steps)} to {max(steps)}, expected 0 to {self.num_timesteps - 1}"
            )
        if not np.isfinite(values).all():
            raise UserError("losses: got nan or inf, expected finite numbers")
        for step, loss in zip(steps, values, strict=True):
            self.losses[step, self.counts[step] % self.history_per_term] = loss
            self.counts[step] += 1
