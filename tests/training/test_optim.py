"""Optimisers: protocol, state in and out, clipping, schedule; numbers are in test_golden_trajectories.py."""

import pytest
import torch
from torch import Tensor, nn

from mdt_fast.config import TrainConfig
from mdt_fast.errors import UserError
from mdt_fast.training.optim import AdamW, Adan, Ema, build_optimizer, learning_rate


def scalar_adan(grads: list[float], lr: float, betas: tuple[float, float, float], decay: float) -> float:
    """Adan on one number that starts at 1, written out in Python floats."""
    b1, b2, b3 = betas
    p, m, v, n, prev = 1.0, 0.0, 0.0, 0.0, grads[0]
    for k, g in enumerate(grads, start=1):
        d = g - prev
        m, v, n = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * d, b3 * n + (1 - b3) * (g + b2 * d) ** 2
        denom = (n / (1 - b3**k)) ** 0.5 + 1e-8
        p = (p - lr * (m / (1 - b1**k) + b2 * v / (1 - b2**k)) / denom) / (1 + lr * decay)
        prev = g
    return p


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_adan_follows_its_definition(decay: float) -> None:
    grads, betas = [0.5, -0.2, 0.9, 0.1], (0.98, 0.92, 0.99)
    p = nn.Parameter(torch.ones((), dtype=torch.float64))
    optimizer = Adan([p], lr=0.01, betas=betas, weight_decay=decay)
    for g in grads:
        p.grad = torch.tensor(g, dtype=torch.float64)
        optimizer.step()
    assert p.item() == pytest.approx(scalar_adan(grads, 0.01, betas, decay), rel=1e-12)


@pytest.mark.parametrize("cls", [Adan, AdamW])
def test_state_goes_out_and_in(cls: type[Adan | AdamW]) -> None:
    def steps(optimizer: torch.optim.Optimizer, p: Tensor, count: int, first: int) -> None:
        for i in range(first, first + count):
            p.grad = torch.linspace(-1, 1, 6) * (i + 1)
            optimizer.step()

    whole = nn.Parameter(torch.arange(6.0))
    steps(cls([whole], lr=0.1), whole, 6, 0)
    half = nn.Parameter(torch.arange(6.0))
    first = cls([half], lr=0.1)
    steps(first, half, 3, 0)
    second = cls([half], lr=0.7)
    second.load_state_dict(first.state_dict())
    steps(second, half, 3, 3)
    assert torch.equal(half, whole)


@pytest.mark.parametrize("cls", [Adan, AdamW])
def test_the_global_norm_is_clipped_and_reported(cls: type[Adan | AdamW]) -> None:
    params = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(3))]
    for p in params:
        p.grad = torch.full_like(p, 4.0)
    optimizer = cls(params, lr=0.1, max_grad_norm=1.0)
    optimizer.step()
    assert optimizer.grad_norm.item() == pytest.approx(80**0.5)
    clipped = torch.cat([p.grad for p in params if p.grad is not None]).norm().item()
    assert clipped == pytest.approx(1.0, rel=1e-5)


def test_a_parameter_without_gradient_is_left_alone() -> None:
    used, unused = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    used.grad = torch.ones(2)
    optimizer = Adan([used, unused], lr=0.1, weight_decay=0.5)
    optimizer.step()
    assert torch.equal(unused, torch.ones(2))
    assert not torch.equal(used, torch.ones(2))


def test_no_gradient_at_all_is_a_clear_error() -> None:
    with pytest.raises(UserError, match=r"call backward\(\) first"):
        Adan([nn.Parameter(torch.ones(1))]).step()


def test_schedule() -> None:
    warm = TrainConfig(lr=1.0, warmup_steps=4)
    assert [learning_rate(warm, step) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    anneal = TrainConfig(lr=1.0, lr_anneal_steps=4)
    assert [learning_rate(anneal, step) for step in range(4)] == [1.0, 1.0, 0.75, 0.5]


def test_frozen_parameters_are_not_optimised() -> None:
    model = nn.Linear(2, 2)
    model.bias.requires_grad_(False)
    optimizer = build_optimizer(model.parameters(), TrainConfig())
    assert len(optimizer.param_groups[0]["params"]) == 1


def test_bad_values_are_named() -> None:
    with pytest.raises(UserError, match=r"train\.lr: must be at least 0 and finite, got -1"):
        build_optimizer([nn.Parameter(torch.ones(1))], TrainConfig(lr=-1.0))
    with pytest.raises(UserError, match=r"betas: three values in \[0, 1\) needed"):
        Adan([nn.Parameter(torch.ones(1))], betas=(0.9, 0.9, 1.0))
    with pytest.raises(UserError, match=r"train.ema_decay: must be in \[0, 1\), got 1"):
        Ema(nn.Linear(1, 1), 1.0)
