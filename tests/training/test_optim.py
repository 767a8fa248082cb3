"""The optimiser that a configuration names, its schedule and average; steps are in tests/test_optim.py."""

import pytest
import torch
from torch import nn

from mdt_fast.config import TrainConfig
from mdt_fast.errors import UserError
from mdt_fast.optim import FusedAdamW, FusedAdan
from mdt_fast.training.optim import Ema, LossScale, build_optimizer, learning_rate, optimize
from tiny import LEAN, needs_csrc


@pytest.mark.parametrize(("name", "cls"), [("adan", FusedAdan), ("adamw", FusedAdamW)])
def test_the_configured_optimizer(name: str, cls: type) -> None:
    config = TrainConfig(optimizer=name, lr=0.5, weight_decay=0.25, max_grad_norm=2.0)
    optimizer = build_optimizer(nn.Linear(2, 2).parameters(), config)
    assert type(optimizer) is cls
    assert optimizer.max_grad_norm == 2
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert optimizer.param_groups[0]["weight_decay"] == 0.25


def test_the_average_moves_with_the_trained_parameters() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].weight.requires_grad_(False)
    ema = Ema(model, 0.5)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = build_optimizer(model.parameters(), TrainConfig(lr=0.1))
    ema.attach(optimizer)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    for average, p, start in zip(ema.tensors.values(), model.parameters(), before):
        torch.testing.assert_close(average, 0.5 * start + 0.5 * p.detach())


def test_the_average_in_the_model_and_back() -> None:
    model = nn.Linear(3, 2)
    ema = Ema(model, 0.9)
    own = [p.detach().clone() for p in model.parameters()]
    for average in ema.tensors.values():
        average.add_(1.0)
    moved = [average.clone() for average in ema.tensors.values()]
    with ema.in_model() as averaged:
        assert averaged is model
        assert not model.training
        assert all(map(torch.equal, model.parameters(), moved))
    assert model.training
    assert all(map(torch.equal, model.parameters(), own))
    assert all(map(torch.equal, ema.tensors.values(), moved))


def test_the_average_of_bfloat16_weights_is_float32_and_comes_and_goes_whole() -> None:
    model = nn.Linear(3, 2).bfloat16()
    ema = Ema(model, 0.9)
    own = [p.detach().clone() for p in model.parameters()]
    for average in ema.tensors.values():
        average.add_(1e-3)
    moved = [average.clone() for average in ema.tensors.values()]
    with ema.in_model():
        assert all(map(torch.equal, model.parameters(), moved))
        assert model(torch.ones(1, 3)).dtype == torch.float32
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert all(map(torch.equal, model.parameters(), own))
    assert all(map(torch.equal, ema.tensors.values(), moved))


@needs_csrc
@pytest.mark.parametrize("name", ["adan", "adamw"])
def test_float32_weights_of_a_bfloat16_model(name: str) -> None:
    """They start as the original weights, bit for bit, frozen ones included."""
    model = nn.Linear(3, 2)
    model.bias.requires_grad_(False)
    began = {key: p.detach().clone() for key, p in model.named_parameters()}
    optimizer, ema, masters = optimize(model, TrainConfig(optimizer=name, ema_decay=0.5, **LEAN))
    assert all(torch.equal(masters[key], value) for key, value in began.items())
    model(torch.ones(1, 3, dtype=torch.bfloat16)).sum().backward()
    optimizer.step()
    for key, p in model.named_parameters():
        assert p.dtype == torch.bfloat16
        assert torch.equal(p, masters[key].bfloat16())
        torch.testing.assert_close(ema.tensors[key], 0.5 * began[key] + 0.5 * masters[key])
    assert not torch.equal(masters["weight"], began["weight"])
    assert optimizer.state[model.weight]["exp_avg"].dtype == torch.bfloat16
    whole = optimize(nn.Linear(3, 2), TrainConfig(moments="bfloat16"))
    assert whole[2] == {}


def test_loss_scale() -> None:
    """Halved after each bad step, doubled after ``patience`` good ones, bounded."""
    scale, optimizer = (
        LossScale(torch.device("cpu"), patience=2),
        torch.optim.SGD([nn.Parameter(torch.ones(2))]),
    )
    assert scale.scale == 2.0**16
    bad, good = torch.tensor(float("inf")), torch.tensor(1.0)
    seen = []
    for norm in (bad, good, bad, good, good, good, good, good):
        scale.update(norm)
        seen.append(scale.scale.item() / 2**16)
    assert seen == [0.5, 0.5, 0.25, 0.25, 0.5, 0.5, 1.0, 1.0]
    optimizer.param_groups[0]["params"][0].grad = torch.full((2,), 2.0**17)
    scale.unscale(optimizer)
    assert optimizer.param_groups[0]["params"][0].grad.tolist() == [2.0, 2.0]


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
    with pytest.raises(UserError, match=r"train\.lr: got -1.*, expected a finite number of 0 or more"):
        build_optimizer([nn.Parameter(torch.ones(1))], TrainConfig(lr=-1.0))
    with pytest.raises(UserError, match=r"train.ema_decay: got 1.0, expected \[0, 1\)"):
        Ema(nn.Linear(1, 1), 1.0)
