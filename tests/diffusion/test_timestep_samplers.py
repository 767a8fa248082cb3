"""Which timesteps training draws: golden draws and weights, unbiasedness, and mistakes."""

import numpy as np
import pytest
import torch

from golden_files import load, meta
from mdt_fast.diffusion import LossSecondMomentSampler, UniformSampler
from mdt_fast.errors import UserError
from tolerances import FLOAT32, FLOAT64, relative_error


@pytest.fixture
def numpy_seed():
    """NumPy's function to seed its global state, which is restored afterwards."""
    state = np.random.get_state()
    yield np.random.seed
    np.random.set_state(state)


def test_golden_uniform_seed123(numpy_seed) -> None:
    golden = load("samplers")
    numpy_seed(123)
    t, weights = UniformSampler(1000).sample(32, "cpu")
    assert t.dtype == torch.int64
    assert torch.equal(t, golden["uniform/seed123_t"])
    assert torch.equal(weights, golden["uniform/weights"])


def test_golden_loss_second_moment(numpy_seed) -> None:
    golden = load("samplers")
    sampler = LossSecondMomentSampler(
        10,
        history_per_term=meta("samplers")["history_per_term"],
        uniform_prob=meta("samplers")["uniform_prob"],
    )
    done = 0
    for count in (50, 120, 400):
        sampler.update(golden["lsm/ts"][done:count], golden["lsm/losses"][done:count])
        expected = golden[f"lsm/weights_after_{count}"]
        assert relative_error(torch.from_numpy(sampler.weights()), expected) <= FLOAT64
        done = count
    numpy_seed(9)
    t, weights = sampler.sample(32)
    assert torch.equal(t, golden["lsm/seed9_t"])
    assert relative_error(weights, golden["lsm/seed9_weights"]) <= FLOAT32


def _warm(rng: np.random.Generator | None = None) -> LossSecondMomentSampler:
    sampler = LossSecondMomentSampler(4, history_per_term=3, rng=rng)
    sampler.update(torch.arange(4).repeat(3), torch.tensor([1.0, 2.0, 3.0, 4.0]).repeat(3))
    return sampler


def test_importance_weights_keep_the_mean() -> None:
    sampler = _warm(np.random.default_rng(0))
    losses = torch.tensor([1.0, 2.0, 3.0, 4.0])
    t, weights = sampler.sample(40_000)
    assert (weights * losses[t]).mean().item() == pytest.approx(2.5, rel=0.01)
    assert t.bincount().argsort().tolist() == [0, 1, 2, 3]


def test_history_forgets_the_oldest() -> None:
    sampler = _warm()
    sampler.update(torch.tensor([0, 0, 0]), torch.tensor([9.0, 9.0, 9.0]))
    weights = sampler.weights()
    assert weights[0] / weights[1] == pytest.approx(9 / 2, rel=1e-2)


def test_rng_repeats() -> None:
    first, second = (UniformSampler(1000, rng=np.random.default_rng(3)).sample(8)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_mistakes_are_named() -> None:
    with pytest.raises(UserError, match="num_timesteps: got 0, expected 1 or more"):
        UniformSampler(0)
    with pytest.raises(UserError, match="history_per_term: got 0, expected 1 or more"):
        LossSecondMomentSampler(10, 0)
    with pytest.raises(UserError, match="uniform_prob: got 2, expected 0 to 1"):
        LossSecondMomentSampler(10, uniform_prob=2)
    with pytest.raises(UserError, match="t: got values from -1 to -1, expected 0 to 3"):
        _warm().update(torch.tensor([-1]), torch.tensor([1.0]))
    with pytest.raises(UserError, match=r"losses: got .*, expected one per timestep"):
        _warm().update(torch.tensor([1]), torch.tensor([1.0, 2.0]))
    with pytest.raises(UserError, match="losses: got nan or inf, expected finite numbers"):
        _warm().update(torch.tensor([1, 2]), torch.tensor([1.0, torch.nan]))


def test_zero_losses_are_uniform() -> None:
    sampler = LossSecondMomentSampler(2, history_per_term=1)
    sampler.update(torch.tensor([0, 1]), torch.zeros(2))
    assert sampler.weights().tolist() == [1, 1]
