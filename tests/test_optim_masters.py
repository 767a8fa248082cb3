"""Float32 masters given to an optimiser of bfloat16 parameters: moved, saved, copied, and refused."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from fused import BOTH, parameters, run, set_grads
from fused import served as served  # a fixture
from mdt_fast.errors import UserError
from mdt_fast.optim import FusedAdamW

pytestmark = pytest.mark.usefixtures("served")


@BOTH
def test_masters_that_are_given_move_and_are_not_rounded_first(cls: Any) -> None:
    """Like float32 parameters with these gradients, including averages and parameters without gradients."""
    wide = parameters()
    params = [nn.Parameter(p.detach().bfloat16()) for p in wide]
    masters = [p.detach().clone() for p in wide]
    optimizer, other = cls(params, lr=1e-3), cls(wide, lr=1e-3)
    optimizer.set_masters(masters)
    averages = [[p.detach().clone() for p in masters] for _ in range(2)]
    optimizer.add_ema(averages[0], 0.5)
    other.add_ema(averages[1], 0.5)
    for step in range(4):
        set_grads(params, step)
        params[0].grad = None
        for p, q in zip(wide, params):
            p.grad = None if q.grad is None else q.grad.float()
        optimizer.step()
        other.step()
    for p, q, master in zip(params, wide, masters):
        torch.testing.assert_close(master, q.detach(), rtol=1e-6, atol=1e-6)
        assert torch.equal(p, master.bfloat16())
    assert all(
        optimizer.state[p]["master"].data_ptr() == m.data_ptr() for p, m in zip(params[1:], masters[1:])
    )
    for ours, theirs in zip(*averages):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


@BOTH
def test_masters_and_states(cls: Any) -> None:
    """Loading a state writes into the given masters, a copy has its own, and misfits are refused by name."""
    params = parameters(torch.bfloat16)
    masters = [p.detach().float() for p in params]
    optimizer = cls(params)
    for given, message in (
        (masters[1:], rf"masters: {len(params) - 1} tensors for {len(params)} parameters"),
        ([p.detach() for p in params], r"masters\[0\]: torch.bfloat16 .*, expected torch.float32"),
    ):
        with pytest.raises(UserError, match=message):
            optimizer.set_masters(given)
    optimizer.set_masters(masters)
    run(optimizer, params, 1)
    state = copy.deepcopy(optimizer.state_dict())
    copied = copy.deepcopy((optimizer, params))
    before = [master.clone() for master in masters]
    run(*copied, 1, 1)
    assert all(map(torch.equal, masters, before))
    (copied_master, *_), own = copied[0]._masters, copied[0].state[copied[1][0]]["master"]
    assert own.data_ptr() == copied_master.data_ptr() != masters[0].data_ptr()
    run(optimizer, params, 1, 1)
    assert not torch.equal(masters[0], before[0])
    optimizer.load_state_dict(state)
    assert optimizer.state[params[0]]["master"].data_ptr() == masters[0].data_ptr()
    assert all(map(torch.equal, masters, before))
    other = cls(copied[1])
    other.add_ema([master.clone() for master in masters], 0.9)
    for given, message in (
        ([master + 1 for master in masters], r"masters\[0\]: does not round to its parameter in bfloat16"),
        (other._averages[0], r"masters\[0\]: is a tensor that the optimiser already has; make a copy"),
    ):
        with pytest.raises(UserError, match=message):
            other.set_masters(given)
    for given, message in (
        ([torch.zeros(()).expand(p.shape) for p in params], r"masters\[0\]: is expanded, its elements share"),
        ([[1.0]] * len(params), r"masters\[0\]: a list, expected a dense tensor"),
        ([master.to_sparse() for master in masters], r"masters\[0\]: a torch.sparse_coo tensor, expected a"),
    ):
        with pytest.raises(UserError, match=message):
            cls(copied[1]).set_masters(given)
    with pytest.raises(UserError, match=r"params\[0\]: is a tensor that the optimiser already has"):
        optimizer.add_ema(masters, 0.9)
    twice = cls([nn.Parameter(torch.ones(2)) for _ in range(2)])
    with pytest.raises(UserError, match=r"params\[1\]: is a tensor that the optimiser already has"):
        twice.add_ema([torch.ones(2)] * 2, 0.9)
    with pytest.raises(UserError, match="set_masters: there are masters already"):
        optimizer.set_masters(masters)
    with pytest.raises(UserError, match="add_param_group: the masters of set_masters would lack its param"):
        optimizer.add_param_group({"params": parameters()})
    with pytest.raises(UserError, match=r"masters\[0\]: of a parameter in torch.float32"):
        cls(parameters()).set_masters(masters)


@BOTH
def test_masters_follow_weights_that_are_loaded_and_come_out_of_a_pickle(cls: Any) -> None:
    params = parameters(torch.bfloat16)
    optimizer = cls(params)
    optimizer.set_masters([p.detach().float() for p in params])
    run(optimizer, params, 2)
    state = copy.deepcopy(optimizer.state_dict())
    for entries in state["state"].values():
        del entries["master"]
    others = [p + 1 for p in parameters(torch.bfloat16)]
    for p, other in zip(params, others):
        p.data.copy_(other)
    optimizer.load_state_dict(state)
    masters = [optimizer._master(i, p) for i, p in enumerate(params)]
    assert all(torch.equal(master, other.float()) for master, other in zip(masters, others))
    run(optimizer, params, 1, 2)
    back = pickle.loads(pickle.dumps(optimizer))
    own = back.param_groups[0]["params"]
    run(back, own, 1, 3)
    assert all(back.state[p]["master"] is master for p, master in zip(own, back._masters))


@BOTH
@pytest.mark.parametrize("given", [False, True])
def test_masters_follow_a_model_that_is_loaded_between_two_steps(cls: Any, given: bool) -> None:
    """A roll-back trains what was loaded; weights that were not loaded keep their unrounded masters."""
    model, other = (nn.Linear(5, 3).bfloat16() for _ in range(2))
    optimizer = cls(model.parameters(), lr=1e-3)
    masters = [p.detach().float() for p in model.parameters()]
    if given:
        optimizer.set_masters(masters)
    params = list(model.parameters())
    run(optimizer, params, 3)
    kept = [optimizer.state[p]["master"].clone() for p in params]
    model.load_state_dict(model.state_dict())  # the same values: the masters lose nothing
    model.load_state_dict({"bias": other.bias}, strict=False)
    optimizer.param_groups[0]["lr"] = 0.0
    run(optimizer, params, 1, 3)
    weight, bias = (optimizer.state[p]["master"] for p in params)
    assert torch.equal(weight, kept[0])
    assert not torch.equal(weight, model.weight.float())
    assert torch.equal(bias, other.bias.float())
    assert torch.equal(model.bias, other.bias)


@BOTH
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("when", ["without gradient", "state loaded", "before a copy", "after a copy"])
def test_masters_follow_whenever_weights_are_written(cls: Any, given: bool, when: str) -> None:
    """Also in a step without their gradients, and around loading the optimiser's state or copying it."""
    model = nn.Linear(5, 3).bfloat16()
    params = list(model.parameters())
    optimizer = cls(params, lr=1e-2)
    if given:
        optimizer.set_masters([p.detach().float() for p in params])
    average = [p.detach().float() for p in params]
    optimizer.add_ema(average, 0.0)
    run(optimizer, params, 2)
    if when == "without gradient":
        params[0].grad = None
        optimizer.step()
    elif when == "state loaded":
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    elif when == "after a copy":
        optimizer, params, average = copy.deepcopy((optimizer, params, average))
    with torch.no_grad():
        params[0].fill_(0.5)
    if when == "before a copy":
        optimizer, params, average = copy.deepcopy((optimizer, params, average))
    set_grads(params, 2)
    params[0].grad = None
    optimizer.step()
    torch.testing.assert_close(average[0], torch.full_like(average[0], 0.5))
    optimizer.param_groups[0]["lr"] = 0.0
    run(optimizer, params, 1, 3)
    assert (params[0] == 0.5).all()
    assert (optimizer.state[params[0]]["master"] == 0.5).all()


def test_a_master_that_a_plain_optimiser_has_carried_along_is_stale() -> None:
    params = parameters(torch.bfloat16)
    ours, theirs = FusedAdamW(params, lr=1e-2), torch.optim.AdamW(params, lr=1e-2)
    run(ours, params, 2)
    theirs.load_state_dict(ours.state_dict())
    run(theirs, params, 20, 2)
    ours.load_state_dict(theirs.state_dict())
    before = [p.detach().clone() for p in params]
    run(ours, params, 1, 22)
    assert all(((p - b).abs() < 0.03).all() for p, b in zip(params, before))


@BOTH
@pytest.mark.parametrize("given", [False, True])
def test_masters_follow_a_model_that_was_float32_in_between(cls: Any, given: bool) -> None:
    model = nn.Linear(7, 5).bfloat16()
    params = list(model.parameters())
    optimizer = cls(params, lr=1e-2)
    average = [p.detach().float() for p in params]
    optimizer.add_ema(average, 0.5)
    if given:
        optimizer.set_masters([p.detach().float() for p in params])
    run(optimizer, params, 2)
    for p in model.float().parameters():
        p.grad = None
    run(optimizer, params, 20, first=2)
    assert not any("master" in optimizer.state[p] for p in params)
    params[1].grad = None
    optimizer.step()  # its average moves to the parameter itself
    far = average[1].clone()
    optimizer.step()
    torch.testing.assert_close(average[1], (far + params[1].detach()) / 2)
    moved = [p.detach().clone() for p in params]
    model.bfloat16()
    optimizer.param_groups[0]["lr"] = 0.0
    run(optimizer, params, 1, first=22)
    for p, before in zip(params, moved, strict=True):
        assert p.dtype == torch.bfloat16
        assert torch.equal(p, before.bfloat16())


@BOTH
def test_averages_that_overlap_are_refused(cls: Any) -> None:
    params = [nn.Parameter(torch.ones(4)) for _ in range(3)]
    buffer, message = (
        torch.ones(12),
        "shares memory with a tensor that the optimiser already has; make a copy",
    )
    for starts, wrong in (((0, 3, 8), 1), ((8, 5, 0), 0), ((6, 0, 4), 0)):
        with pytest.raises(UserError, match=rf"params\[{wrong}\]: {message}"):
            cls(params).add_ema([buffer[i : i + 4] for i in starts], 0.9)
    optimizer = cls(params)
    optimizer.add_ema([buffer[i : i + 4] for i in (4, 0, 8)], 0.9)
    with pytest.raises(UserError, match=rf"params\[2\]: {message}"):
        optimizer.add_ema([torch.ones(4), torch.ones(4), buffer[1:5]], 0.9)
    whole = torch.ones(8)
    others = [nn.Parameter(whole[:4]), nn.Parameter(torch.ones(4))]
    with pytest.raises(UserError, match=rf"params\[1\]: {message}"):
        cls(others).add_ema([torch.ones(4), whole[2:6]], 0.9)
    cls(params).add_ema(list(torch.ones(4, 3).unbind(1)), 0.9)  # these only lie between each other
