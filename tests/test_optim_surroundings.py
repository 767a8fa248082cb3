"""The fused optimisers in what surrounds them: default dtypes and devices, autograd, models that change."""

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from fused import BOTH, bits, parameters, run, same
from fused import served as served  # a fixture
from mdt_fast.errors import UserError

pytestmark = pytest.mark.usefixtures("served")


@pytest.fixture(params=[torch.bfloat16, torch.float64], ids=str)
def default_dtype(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    """Another default dtype than float32."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(before)


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_the_default_dtype_changes_nothing(cls: Any, dtype: torch.dtype, default_dtype: torch.dtype) -> None:
    def trained() -> list[torch.Tensor]:
        with torch.no_grad():
            params = parameters(dtype)
            for p in params:
                p.copy_(torch.arange(p.numel(), dtype=torch.float64).view(p.shape) / 64)
        optimizer = cls(params, lr=1e-2, max_grad_norm=1.0)
        run(optimizer, params, 3)
        optimizer.load_state_dict(optimizer.state_dict())
        run(optimizer, params, 3, first=3)
        return bits(optimizer, params)

    ours = trained()
    torch.set_default_dtype(torch.float32)
    expected = trained()
    assert same(ours, expected)


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_autograd_notices_a_step(cls: Any, dtype: torch.dtype) -> None:
    """A backward pass through weights that a step has changed is an error, as with torch's optimisers."""
    params = parameters(dtype)
    optimizer = cls(params)
    averages = [p.detach().to(torch.float32).clone() for p in params]
    optimizer.add_ema(averages, 0.9)
    if dtype == torch.bfloat16:
        optimizer.set_masters([p.detach().float() for p in params])
    for step in range(2):
        written = [*params, *averages, *optimizer._masters]
        before = [x._version for x in written]
        loss = params[0].square().sum()
        run(optimizer, params, 1, first=step)
        assert all(x._version > version for x, version in zip(written, before, strict=True))
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@BOTH
def test_the_default_device_changes_nothing(cls: Any) -> None:
    params, others = parameters(), parameters()
    with torch.device("meta"):
        optimizer = cls(params)
    other = cls(others)
    run(optimizer, params, 2)
    with torch.device("meta"):
        optimizer.load_state_dict(optimizer.state_dict())
    run(optimizer, params, 2, first=2)
    run(other, others, 4)
    assert same(bits(optimizer, params), bits(other, others))


@BOTH
@pytest.mark.parametrize("bad", [{"betas": None}, {"eps": "1"}, {"lr": torch.tensor(-1.0)}], ids=str)
def test_a_group_that_is_refused_is_not_added(cls: Any, bad: dict[str, Any]) -> None:
    params = parameters()
    optimizer = cls(params[1:])
    with pytest.raises(UserError, match=f"{next(iter(bad))}: "):
        optimizer.add_param_group({"params": params[:1], **bad})
    assert len(optimizer.param_groups) == 1
    run(optimizer, params[1:], 1)


@BOTH
def test_an_option_that_is_turned_on_later_is_refused(cls: Any) -> None:
    params = parameters()
    optimizer = cls(params)
    run(optimizer, params, 1)
    before = bits(optimizer, params)
    for option in cls.refused:
        own = optimizer.param_groups[0][option]
        optimizer.param_groups[0][option] = not own
        with pytest.raises(UserError, match=f"{option}: {not own} is not supported, only {own}"):
            optimizer.step()
        optimizer.param_groups[0][option] = own
    assert same(before, bits(optimizer, params))


@BOTH
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda given: pickle.loads(pickle.dumps(given))])
def test_a_copy_moves_the_copied_average(cls: Any, copied: Any) -> None:
    """Also before the average in the copied tuple; and an average follows when its module is cast."""
    model = nn.Linear(3, 2)
    average = copy.deepcopy(model)
    optimizer = cls(model.named_parameters())
    optimizer.add_ema(average.named_parameters(), 0.5)
    other, other_average, other_model = copied((optimizer, average, model))
    for o, m, e in ((optimizer, model, average), (other, other_model, other_average)):
        before = e.weight.detach().clone()
        run(o, list(m.parameters()), 1)
        torch.testing.assert_close(e.weight, (before + m.weight) / 2)
    average.half()
    before = model.weight.detach().clone()
    message = r"^params\['weight'\] of add_ema: got torch.float16 on cpu, expected torch.float32 on cpu"
    with pytest.raises(UserError, match=message):
        run(optimizer, list(model.parameters()), 1, 1)
    assert torch.equal(model.weight, before)
    average.float()
    run(optimizer, list(model.parameters()), 1, 1)
    torch.testing.assert_close(
        average.weight, (before.half().float() + model.weight) / 2, rtol=1e-3, atol=1e-3
    )


@BOTH
@pytest.mark.parametrize("given", ["averages", "masters"])
def test_parameters_taken_out_of_a_group(cls: Any, given: str) -> None:
    """Averages and masters, which go by position, are never those of another parameter."""
    params = [nn.Parameter(torch.full((2,), float(i)).bfloat16()) for i in range(3)]
    optimizer, copies = cls(params, lr=0.0, weight_decay=0.0), [p.detach().float() for p in params]
    if given == "averages":
        optimizer.add_ema(copies, 0.5)
    else:
        optimizer.set_masters(copies)
    del optimizer.param_groups[0]["params"][0]
    with pytest.raises(
        UserError, match=f"^param_groups: got 2 parameters, expected those 3 that {given} were"
    ):
        run(optimizer, params, 1)
    assert all((p == i).all() for i, p in enumerate(params))
    assert all((copy == i).all() for i, copy in enumerate(copies))
