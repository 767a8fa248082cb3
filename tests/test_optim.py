"""The fused optimisers' numbers against torch's and plain float64 ones, with and without native ops."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fused import BOTH, assert_near, bits, parameters, run, same, set_grads, strided
from fused import served as served  # a fixture
from mdt_fast.errors import UserError
from mdt_fast.optim import FusedAdamW, FusedAdan

pytestmark = pytest.mark.usefixtures("served")


def plain_adan(
    params: list[Tensor], grads: Callable[[int], list[Tensor]], count: int, lr: float, decay: float,
    no_prox: bool, max_norm: float, betas: tuple[float, float, float] = (0.98, 0.92, 0.99), eps: float = 1e-8,
) -> list[Tensor]:  # fmt: skip
    """Adan with clipping as in its paper, one parameter after the other, in float64."""
    b1, b2, b3 = betas
    p = [x.detach().double().clone() for x in params]
    m, v, n = ([torch.zeros_like(x) for x in p] for _ in range(3))
    before: list[Tensor] = []
    for k in range(1, count + 1):
        g = [x.double() for x in grads(k - 1)]
        if max_norm:
            norm = torch.cat([x.flatten() for x in g]).norm()
            g = [x * min(1.0, max_norm / (norm.item() + eps)) for x in g]
        for i, x in enumerate(g):
            d = x - before[i] if before else torch.zeros_like(x)
            m[i] = b1 * m[i] + (1 - b1) * x
            v[i] = b2 * v[i] + (1 - b2) * d
            n[i] = b3 * n[i] + (1 - b3) * (x + b2 * d) ** 2
            step = m[i] / (1 - b1**k) + b2 * v[i] / (1 - b2**k)
            step = lr * step / ((n[i] / (1 - b3**k)).sqrt() + eps)
            p[i] = p[i] * (1 - lr * decay) - step if no_prox else (p[i] - step) / (1 + lr * decay)
        before = g
    return p


@pytest.mark.parametrize("clip", [0.0, 2.0])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_adamw_is_torchs(clip: float, decay: float) -> None:
    ours, theirs = parameters(), parameters(torch.float64)
    fused = FusedAdamW(ours, lr=1e-2, weight_decay=decay, max_grad_norm=clip)
    plain = torch.optim.AdamW(theirs, lr=1e-2, weight_decay=decay)
    for step in range(100):
        set_grads(ours, step)
        for p, q in zip(theirs, ours):
            p.grad = q.grad.double()  # type: ignore[union-attr]
        norm = nn.utils.clip_grad_norm_(theirs, clip or float("inf"), foreach=False)
        fused.step()
        plain.step()
        assert fused.grad_norm.item() == pytest.approx(norm.item(), rel=1e-6)
    assert_near(ours, theirs, 2e-5)
    for p, q in zip(ours, theirs):
        assert fused.state[p]["step"] == plain.state[q]["step"] == 100


@pytest.mark.parametrize("no_prox", [False, True])
@pytest.mark.parametrize("clip", [0.0, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_adan_is_its_definition(no_prox: bool, clip: float, dtype: torch.dtype) -> None:
    params = parameters(dtype)

    def grads(step: int) -> list[Tensor]:
        set_grads(params, step)
        return [p.grad for p in params if p.grad is not None]

    expected = plain_adan(list(params), grads, 100, 1e-2, 0.1, no_prox, clip)
    optimizer = FusedAdan(params, lr=1e-2, weight_decay=0.1, no_prox=no_prox, max_grad_norm=clip)
    run(optimizer, params, 100)
    assert_near(list(params), expected, 1e-10 if dtype == torch.float64 else 2e-5)


@BOTH
def test_averages_in_any_order_by_name(cls: Any) -> None:
    """With groups in another order than the model's, and several parameters of one shape."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    average = copy.deepcopy(model)
    named = list(model.named_parameters())
    groups = [{"params": named[2:]}, {"params": named[:2], "weight_decay": 0.0}]
    optimizer = cls(groups, lr=1e-2)
    optimizer.add_ema(average.named_parameters(), 0.0)
    set_grads([p for _, p in named], 0)
    optimizer.step()
    for ours, theirs in zip(average.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    with pytest.raises(UserError, match=r"params: '1.bias' is not in params"):
        optimizer.add_ema(list(copy.deepcopy(model).named_parameters())[:3], 0.5)
    with pytest.raises(UserError, match=r"params: 'x' is not in the optimiser"):
        optimizer.add_ema([*copy.deepcopy(model).named_parameters(), ("x", torch.zeros(1))], 0.5)
    with pytest.raises(UserError, match=r"params: has names, the optimiser's parameters have none"):
        cls(model.parameters(), lr=1e-2).add_ema(copy.deepcopy(model).named_parameters(), 0.5)
    with pytest.raises(UserError, match=r"^params\['1.weight'\]: torch.bfloat16 \[8, 8\] on cpu, expected"):
        optimizer.add_ema(copy.deepcopy(model).bfloat16().named_parameters(), 0.5)


@BOTH
def test_averages_are_those_of_a_sweep_of_their_own(cls: Any) -> None:
    params = parameters()
    averages = {decay: [p.detach().clone() for p in params] for decay in (0.0, 0.9, 0.999)}
    expected = copy.deepcopy(averages)
    optimizer = cls(params, lr=1e-2)
    for decay, average in averages.items():
        optimizer.add_ema(average, decay)
    for step in range(20):
        set_grads(params, step)
        if step >= 10:
            params[0].grad = None  # averaged all the same
        optimizer.step()
        for decay, average in expected.items():
            for ema, p in zip(average, params):
                ema.copy_(decay * ema + (1 - decay) * p.detach())
    for decay in averages:
        assert_near(averages[decay], expected[decay], 1e-6)


@BOTH
def test_thousands_of_tensors(cls: Any) -> None:
    params = parameters(shapes=[(i % 7, i % 3) for i in range(3000)])
    alone = parameters(shapes=[(i % 7, i % 3) for i in range(3000)])
    run(cls(params), params, 3)
    last = [alone[-1]]
    set_grads(alone, 0)
    optimizer = cls(last)
    for step in range(3):
        set_grads(alone, step)
        optimizer.step()
    assert torch.equal(params[-1], alone[-1])


@BOTH
@pytest.mark.parametrize("kind", ["transposed", "slice"])
@pytest.mark.parametrize("grad", ["contiguous", "as the parameter", "expanded"])
def test_parameters_and_gradients_of_any_layout(cls: Any, kind: str, grad: str) -> None:
    p, plain = strided(kind), nn.Parameter(strided(kind).detach().contiguous())
    optimizer, other = cls([p], lr=1e-2), cls([plain], lr=1e-2)
    for step in range(3):
        g = torch.randn(p.shape, generator=torch.Generator().manual_seed(step))
        if grad == "expanded":
            g = g[:1].expand(p.shape)
        plain.grad = g.contiguous()
        p.grad = torch.empty_strided(p.shape, p.stride()).copy_(g) if grad == "as the parameter" else g
        optimizer.step()
        other.step()
        if step == 1:  # load a state in another layout
            state = copy.deepcopy(optimizer.state_dict())
            for entries in state["state"].values():
                entries.update({k: v.contiguous() for k, v in entries.items()})
            optimizer.load_state_dict(state)
    assert_near([p], [plain], 1e-6)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shapes=st.lists(st.lists(st.integers(0, 9), max_size=3).map(tuple), min_size=1, max_size=6),
    adan=st.booleans(), clip=st.sampled_from([0.0, 0.5]),
)  # fmt: skip
def test_any_shapes(shapes: list[tuple[int, ...]], adan: bool, clip: float) -> None:
    cls: Any = FusedAdan if adan else FusedAdamW
    params, exact = parameters(shapes=shapes), parameters(torch.float64, shapes)
    run(cls(params, lr=1e-2, max_grad_norm=clip), params, 3)
    optimizer = cls(exact, lr=1e-2, max_grad_norm=clip)
    for step in range(3):
        set_grads(params, step)
        for p, q in zip(exact, params):
            p.grad = q.grad.double()  # type: ignore[union-attr]
        optimizer.step()
    assert_near(list(params), list(exact), 1e-4)


@BOTH
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_gradient_that_is_not_finite_changes_nothing(cls: Any, value: float, dtype: torch.dtype) -> None:
    params = parameters(dtype)
    optimizer = cls(params, lr=1e-2, max_grad_norm=1.0)
    optimizer.add_ema([p.detach().float() + 1 for p in params], 0.9)
    run(optimizer, params, 2)
    before = bits(optimizer, params)
    set_grads(params, 2)
    params[-1].grad[0, 0, 0] = value  # type: ignore[index]
    params[0].grad = None
    optimizer.step()
    assert same(bits(optimizer, params), before)
    assert optimizer.skipped_steps == 1
    assert not optimizer.grad_norm.isfinite()
    run(optimizer, params, 1, 3)
    assert optimizer.skipped_steps == 1
    assert not same(bits(optimizer, params), before)


@BOTH
def test_a_step_that_is_skipped_leaves_averages_of_infinite_parameters(cls: Any) -> None:
    params = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.tensor([1.0, float("inf"), 2.0]))]
    optimizer = cls(params)
    averages = [torch.ones(3), torch.zeros(3)]
    optimizer.add_ema(averages, 0.5)
    params[0].grad = torch.full((3,), float("nan"))
    optimizer.step()
    assert optimizer.skipped_steps == 1
    assert torch.equal(averages[1], torch.zeros(3))
    params[0].grad = torch.ones(3)
    optimizer.step()
    assert torch.equal(averages[1], torch.tensor([0.5, float("inf"), 1.0]))


@BOTH
def test_a_first_step_that_is_skipped(cls: Any) -> None:
    params, others = parameters(), parameters()
    optimizer, other = cls(params, lr=1e-2), cls(others, lr=1e-2)
    set_grads(params, 7)
    params[0].grad.fill_(float("inf"))  # type: ignore[union-attr]
    optimizer.step()
    assert same([p.detach() for p in params], [p.detach() for p in others])
    run(optimizer, params, 3)
    run(other, others, 3)
    assert same(bits(optimizer, params), bits(other, others))


def test_a_parameter_that_joins_later_begins_with_no_change_of_its_gradient() -> None:
    early, late, plain = (nn.Parameter(torch.ones(3)) for _ in range(3))
    optimizer = FusedAdan([early, late], max_grad_norm=1.0)
    early.grad = torch.ones(3)
    optimizer.step()
    late.grad = torch.full((3,), float("nan"))
    optimizer.step()  # skipped: the parameter does not begin here
    assert optimizer.skipped_steps == 1
    late.grad = torch.tensor([1.0, 2.0, 3.0])
    optimizer.step()
    assert late.grad.tolist() == [1, 2, 3]
    state = optimizer.state[late]
    assert state["exp_avg_diff"].abs().max() < 1e-7
    scale = 1 / (optimizer.grad_norm.item() + 1e-8)
    torch.testing.assert_close(state["neg_pre_grad"], -late.grad * scale)
    assert plain.grad is None


@BOTH
def test_bfloat16_parameters_are_rounded_masters(cls: Any) -> None:
    params = parameters(torch.bfloat16)
    wide = [nn.Parameter(p.detach().float()) for p in params]
    optimizer, other = cls(params, lr=1e-3), cls(wide, lr=1e-3)
    for step in range(30):
        set_grads(params, step)
        for p, q in zip(wide, params):
            p.grad = q.grad.float()  # type: ignore[union-attr]
        optimizer.step()
        other.step()
    for p, q in zip(params, wide):
        master = optimizer.state[p]["master"]
        assert master.dtype == torch.float32
        assert torch.equal(p, master.bfloat16())
        torch.testing.assert_close(master, q.detach(), rtol=1e-6, atol=1e-6)
        assert optimizer.state[p]["exp_avg"].dtype == torch.float32


@BOTH
def test_float32_gradients_of_bfloat16_parameters(cls: Any) -> None:
    params, others = parameters(torch.bfloat16), parameters(torch.bfloat16)
    optimizer, other = cls(params), cls(others)
    for step in range(3):
        set_grads(others, step)
        for p, q in zip(params, others):
            p.grad_dtype = None
            p.grad = q.grad.float()  # type: ignore[union-attr]
        optimizer.step()
        other.step()
    assert_near(list(params), list(others), 1e-6)


@BOTH
def test_bfloat16_moments_stay_near(cls: Any, served: str) -> None:
    shape = [(64, 64)]
    params, wide = parameters(shapes=shape), parameters(shapes=shape)
    optimizer, other = cls(params, lr=1e-3, moments_dtype=torch.bfloat16), cls(wide, lr=1e-3)
    run(optimizer, params, 50)
    run(other, wide, 50)
    state, exact = optimizer.state[params[0]], other.state[wide[0]]
    assert {state[name].dtype for name in optimizer.moments} == {torch.bfloat16}
    moved = (wide[0].detach() - parameters(shapes=shape)[0].detach()).norm()
    assert (params[0].detach() - wide[0].detach()).norm() < 0.1 * moved
    if served == "native":  # rounded stochastically, so the errors of 4096 numbers cancel
        for name in ("exp_avg", "exp_avg_sq"):
            error = state[name].double() - exact[name].double()
            assert error.mean().abs() < 6 * error.std() / 64, name
