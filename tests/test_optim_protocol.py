"""The fused optimisers' protocol: states in and out, groups, copies, hooks, schedulers, and refusals."""

import copy
import pickle
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fused import BOTH, SHAPES, assert_near, bits, parameters, run, same, set_grads, strided
from fused import served as served  # a fixture
from mdt_fast.errors import UserError
from mdt_fast.optim import FusedAdamW, FusedAdan

pytestmark = pytest.mark.usefixtures("served")


@pytest.mark.parametrize("no_prox", [False, True])
def test_adan_is_timms_and_their_states_are_interchangeable(no_prox: bool) -> None:
    timm = pytest.importorskip("timm.optim.adan", reason="timm is not installed")
    ours, theirs, swapped, back = (parameters() for _ in range(4))
    options = {"lr": 1e-2, "weight_decay": 0.1, "no_prox": no_prox}
    fused, plain = FusedAdan(ours, **options), timm.Adan(theirs, **options)
    run(fused, ours, 50)
    run(plain, theirs, 50)
    assert_near(ours, theirs, 2e-5)
    states = copy.deepcopy((fused.state_dict(), plain.state_dict()))
    ours_in_theirs, theirs_in_ours = timm.Adan(swapped), FusedAdan(back)
    for params, source in ((swapped, ours), (back, theirs)):
        for p, q in zip(params, source):
            p.data.copy_(q.data)
    ours_in_theirs.load_state_dict(states[0])
    theirs_in_ours.load_state_dict(states[1])
    for optimizer, params in (
        (fused, ours),
        (plain, theirs),
        (ours_in_theirs, swapped),
        (theirs_in_ours, back),
    ):
        run(optimizer, params, 10, 50)
    assert_near(swapped, theirs, 2e-5)
    assert_near(back, theirs, 2e-5)
    assert theirs_in_ours.param_groups[0]["step"] == 60
    assert states[0]["param_groups"][0].keys() == states[1]["param_groups"][0].keys()


def test_adamws_states_are_torchs() -> None:
    ours, theirs, swapped, back = (parameters() for _ in range(4))
    fused, plain = FusedAdamW(ours, lr=1e-2), torch.optim.AdamW(theirs, lr=1e-2)
    run(fused, ours, 20)
    run(plain, theirs, 20)
    states = copy.deepcopy((fused.state_dict(), plain.state_dict()))
    assert states[0]["param_groups"] == states[1]["param_groups"]
    assert [list(x) for x in states[0]["state"].values()] == [list(x) for x in states[1]["state"].values()]
    ours_in_theirs, theirs_in_ours = torch.optim.AdamW(swapped, lr=9.0), FusedAdamW(back, lr=9.0)
    for params, source in ((swapped, ours), (back, theirs)):
        for p, q in zip(params, source):
            p.data.copy_(q.data)
    ours_in_theirs.load_state_dict(states[0])
    theirs_in_ours.load_state_dict(states[1])
    for optimizer, params in (
        (fused, ours),
        (plain, theirs),
        (ours_in_theirs, swapped),
        (theirs_in_ours, back),
    ):
        run(optimizer, params, 10, 20)
    for params in (ours, swapped, back):
        assert_near(params, theirs, 2e-5)


def test_adamw_is_made_as_torchs() -> None:
    """Options that change no number are accepted, others refused; a misspelt one is Python's TypeError."""
    plain = {"amsgrad": False, "maximize": False, "foreach": True, "capturable": True, "fused": True}
    ours, theirs = parameters(), parameters()
    run(FusedAdamW(ours, lr=1e-2, **plain), ours, 2)
    run(FusedAdamW(theirs, lr=1e-2), theirs, 2)
    assert same(ours, theirs)
    for option in ("amsgrad", "maximize", "differentiable"):
        with pytest.raises(UserError, match=f"{option}: True is not supported, only False"):
            FusedAdamW(parameters(), **{option: True})
    with pytest.raises(TypeError, match="unexpected keyword argument 'weight_deacy'"):
        FusedAdamW(parameters(), weight_deacy=0.1)


def test_adans_older_state_is_read() -> None:
    params, again = parameters(), parameters()
    optimizer, other = FusedAdan(params), FusedAdan(again)
    run(optimizer, params, 3)
    state = copy.deepcopy(optimizer.state_dict())
    for entries in state["state"].values():
        entries["prev_grad"] = -entries.pop("neg_pre_grad")
    for key in ("no_prox", "caution", "foreach"):
        del state["param_groups"][0][key]
    other.load_state_dict(state)
    for p, q in zip(again, params):
        p.data.copy_(q.data)
    run(optimizer, params, 3, 3)
    run(other, again, 3, 3)
    assert same(bits(optimizer, params), bits(other, again))


@BOTH
@pytest.mark.parametrize("copied", ["deepcopy", "pickle", "state_dict"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("moments_dtype", [None, torch.bfloat16])
def test_a_copy_goes_on_with_the_same_bits(
    cls: Any, copied: str, dtype: torch.dtype, moments_dtype: torch.dtype | None
) -> None:
    params = parameters(dtype)
    optimizer = cls(params, lr=1e-2, max_grad_norm=1.0, moments_dtype=moments_dtype)
    optimizer.add_ema([p.detach().float().clone() for p in params], 0.9)
    run(optimizer, params, 4)
    if copied == "state_dict":
        others = [nn.Parameter(p.detach().clone()) for p in params]
        other = cls(others, max_grad_norm=1.0, moments_dtype=moments_dtype)
        other.add_ema([ema.clone() for ema in optimizer._averages[0]], 0.9)
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    elif copied == "deepcopy":
        others, other = copy.deepcopy((params, optimizer))
    else:
        others, other = pickle.loads(pickle.dumps((params, optimizer)))
    assert same(bits(optimizer, params), bits(other, others))
    run(optimizer, params, 3, 4)
    run(other, others, 3, 4)
    assert same(bits(optimizer, params), bits(other, others))


@BOTH
def test_groups_have_their_own_values(cls: Any) -> None:
    params, alone = parameters(), parameters()
    groups = [{"params": params[:3], "lr": 1e-1}, {"params": params[3:], "weight_decay": 0.5, "eps": 1e-3}]
    optimizer = cls(groups, lr=1e-2)
    singly = [cls(alone[:3], lr=1e-1), cls(alone[3:], lr=1e-2, weight_decay=0.5, eps=1e-3)]
    for step in range(5):
        set_grads(params, step)
        set_grads(alone, step)
        optimizer.step()
        for single in singly:
            single.step()
    assert same([p.detach() for p in params], [p.detach() for p in alone])


@BOTH
def test_one_group_of_several_dtypes_and_layouts(cls: Any) -> None:
    shapes = [(4, 4)] * 2
    mixed = [*parameters(torch.bfloat16, shapes), *parameters(shapes=shapes), strided("slice")]
    mixed.append(nn.Parameter(mixed[2].detach().double()))
    optimizer = cls(mixed, max_grad_norm=1.0)
    for step in range(3):
        set_grads(mixed, step)
        mixed[-1].grad = mixed[2].grad.double()  # type: ignore[union-attr]
        optimizer.step()
    counts = [optimizer.param_groups[0]["step"]] if cls is FusedAdan else []
    counts += [state["step"] for state in optimizer.state.values() if "step" in state]
    assert all(count == 3 for count in counts)
    torch.testing.assert_close(mixed[2].double(), mixed[-1], rtol=1e-5, atol=1e-6)


@BOTH
def test_group_added_later(cls: Any) -> None:
    first, second = parameters(), parameters()
    optimizer = cls(first)
    run(optimizer, first, 2)
    optimizer.add_param_group({"params": second, "lr": 0.5})
    assert optimizer.param_groups[1]["betas"] == optimizer.param_groups[0]["betas"]
    run(optimizer, [*first, *second], 1)
    assert len(optimizer.state) == 2 * len(SHAPES)


@BOTH
def test_the_rate_may_be_a_tensor_and_scheduled(cls: Any) -> None:
    params, others = parameters(), parameters()
    optimizer, other = cls(params, lr=torch.tensor(0.1)), cls(others, lr=0.1)
    schedules = [torch.optim.lr_scheduler.ExponentialLR(o, 0.5) for o in (optimizer, other)]
    for step in range(4):
        run(optimizer, params, 1, step)
        run(other, others, 1, step)
        for schedule in schedules:
            schedule.step()
    assert isinstance(optimizer.param_groups[0]["lr"], Tensor)
    assert optimizer.param_groups[0]["lr"].item() == pytest.approx(0.1 / 16)
    assert_near(list(params), list(others), 1e-6)


@BOTH
def test_closure_hooks_and_zero_grad(cls: Any) -> None:
    p = nn.Parameter(torch.ones(3))
    optimizer = cls([p])
    called = []
    optimizer.register_step_pre_hook(lambda *_: called.append("before"))
    optimizer.register_step_post_hook(lambda *_: called.append("after"))

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (p**2).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 3
    assert called == ["before", "after"]
    optimizer.zero_grad()
    assert p.grad is None
    assert cls(nn.Linear(2, 2).named_parameters()).state_dict()["param_groups"][0]["param_names"]


@BOTH
def test_gradients_are_never_written_and_runs_repeat(cls: Any) -> None:
    runs = []
    for _ in range(2):
        params = parameters()
        optimizer = cls(params, max_grad_norm=0.01)
        for step in range(3):
            set_grads(params, step)
            before = [p.grad.clone() for p in params if p.grad is not None]
            optimizer.step()
            assert same([p.grad for p in params if p.grad is not None], before)
        runs.append(bits(optimizer, params))
    assert same(*runs)


@BOTH
def test_a_parameter_without_gradient_is_left_alone(cls: Any) -> None:
    used, unused = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    used.grad = torch.ones(2)
    optimizer = cls([used, unused], lr=0.1, weight_decay=0.5)
    optimizer.step()
    assert torch.equal(unused, torch.ones(2))
    assert unused not in optimizer.state
    assert not torch.equal(used, torch.ones(2))


@BOTH
def test_a_plain_state_of_bfloat16_parameters_gets_masters(cls: Any) -> None:
    params = parameters(torch.bfloat16)
    optimizer = cls(params)
    run(optimizer, params, 2)
    state = copy.deepcopy(optimizer.state_dict())
    for entries in state["state"].values():
        del entries["master"]
    optimizer.load_state_dict(state)
    assert "master" not in optimizer.state[params[0]]
    run(optimizer, params, 1, 2)
    assert torch.equal(optimizer.state[params[0]]["master"].bfloat16(), params[0])


@BOTH
def test_the_step_compiles(cls: Any) -> None:
    params, others = parameters(), parameters()
    optimizer, other = cls(params, max_grad_norm=1.0), cls(others, max_grad_norm=1.0)
    step = torch.compile(other.step, backend="aot_eager")
    for i in range(3):
        run(optimizer, params, 1, i)
        set_grads(others, i)
        step()
    assert_near(list(params), list(others), 1e-6)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"lr": -1.0}, "lr: got -1.0"),
    ({"lr": "1"}, "lr: got '1'"),
    ({"lr": None}, "lr: got None"),
    ({"lr": torch.tensor(float("nan"))}, "lr: got nan"),
    ({"lr": torch.tensor(-1.0)}, "lr: got -1.0"),
    ({"eps": 10**400}, "eps: got 1000"),
    ({"betas": None}, "betas: got None"),
    ({"betas": "ab"}, "betas: got 'ab'"),
    ({"max_grad_norm": None}, "max_grad_norm: got None"),
    ({"lr": torch.ones(2)}, "lr: a tensor of shape [2], expected a single number"),
    ({"eps": -1.0}, "eps: got -1.0"),
    ({"weight_decay": float("nan")}, "weight_decay: got nan"),
    ({"betas": (0.9,)}, "betas: got (0.9,)"),
    ({"betas": (0.9, 0.9, 1.0)}, "betas: got (0.9, 0.9, 1.0)"),
    ({"max_grad_norm": -1.0}, "max_grad_norm: got -1.0"),
    ({"clip_norm": "local"}, "clip_norm: got 'local', expected global, rank"),
    (
        {"moments_dtype": torch.float16},
        "moments_dtype: got torch.float16, expected None,",
    ),
]


@BOTH
@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_bad_options_are_named(cls: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        cls(parameters(), **options)


@BOTH
@pytest.mark.parametrize("dtype", [torch.float16, torch.complex64])
def test_dtypes_that_are_not_served(cls: Any, dtype: torch.dtype) -> None:
    optimizer = cls(parameters())
    with pytest.raises(UserError, match=rf"params\[0\]: {dtype}, expected float32, bfloat16, float64"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2, dtype=dtype))]})
    assert len(optimizer.param_groups) == 1


@BOTH
def test_bad_gradients_and_averages_are_named(cls: Any) -> None:
    p = nn.Parameter(torch.ones(3, 2))
    optimizer = cls([p])
    with pytest.raises(UserError, match=r"no parameter has a gradient; call backward\(\) first"):
        optimizer.step()
    p.grad = torch.ones(3, 2).to_sparse()
    with pytest.raises(UserError, match="parameter 0: a sparse gradient"):
        optimizer.step()
    for ema, decay, message in (
        ([torch.ones(3, 2)], 1.0, r"^decay: got 1.0, expected \[0, 1\)"),
        ([torch.ones(3, 2)], None, r"^decay: got None, expected \[0, 1\)"),
        ([], 0.9, "params: 0 tensors for 1 parameters"),
        ([torch.ones(2)], 0.9, r"params\[0\]: torch.float32 \[2\] on cpu, expected torch.float32 \[3, 2\]"),
        ([torch.ones(3, 2).bfloat16()], 0.9, r"params\[0\]: torch.bfloat16"),
    ):
        with pytest.raises(UserError, match=message):
            optimizer.add_ema(ema, decay)
    optimizer.add_ema([torch.ones(3, 2)], 0.9)
    with pytest.raises(UserError, match="add_param_group: the averages of add_ema would lack its parameters"):
        optimizer.add_param_group({"params": parameters()})


def test_states_that_do_not_fit_are_refused_and_change_nothing() -> None:
    params = parameters()
    optimizer, adamw = FusedAdan(params), FusedAdamW(parameters())
    run(optimizer, params, 1)
    before = bits(optimizer, params)
    run(adamw, list(adamw.param_groups[0]["params"]), 1)
    wrong = copy.deepcopy(optimizer.state_dict())
    wrong["state"][0]["exp_avg"] = torch.ones(2)
    cautious, clipped, other = (copy.deepcopy(optimizer.state_dict()) for _ in range(3))
    cautious["param_groups"][0]["caution"] = True
    clipped["param_groups"][0]["max_grad_norm"] = 1.0  # as in the official Adan
    other["param_groups"][0]["betas"] = (0.9, 0.999)
    for state, message in (
        (clipped, "max_grad_norm: 1 in the loaded state, 0 in this optimizer; make it with max_grad_norm=1"),
        (other, r"betas: got \(0.9, 0.999\), expected three values in \[0, 1\)"),
        (adamw.state_dict(), "state of parameter 0: no 'exp_avg_diff'; it has step, exp_avg, exp_avg_sq"),
        (wrong, r"state of parameter 0: exp_avg of shape \[2\], or sharded otherwise, for .* \[7, 5\]"),
        (cautious, "caution: True is not supported, only False"),
    ):
        with pytest.raises(UserError, match=message):
            optimizer.load_state_dict(state)
    uncounted = copy.deepcopy(adamw.state_dict())
    del uncounted["state"][1]["step"]
    with pytest.raises(UserError, match="state of parameter 1: no 'step'; it has exp_avg, exp_avg_sq"):
        adamw.load_state_dict(uncounted)
    for option in ("amsgrad", "maximize"):
        with pytest.raises(UserError, match=f"{option}: True is not supported, only False"):
            adamw.load_state_dict(torch.optim.AdamW(parameters(), **{option: True}).state_dict())
    assert same(bits(optimizer, params), before)
    assert not optimizer._optimizer_load_state_dict_pre_hooks


def test_too_many_averages_are_refused() -> None:
    p = nn.Parameter(torch.ones(2))
    optimizer = FusedAdan([p])
    for _ in range(64):
        optimizer.add_ema([torch.ones(2)], 0.9)
    with pytest.raises(UserError, match="add_ema: there are 64 averages, no more are allowed"):
        optimizer.add_ema([torch.ones(2)], 0.9)
    p.grad = torch.ones(2)
    optimizer.step()


@pytest.mark.parametrize("lr", [-1.0, float("inf"), float("nan"), 1e39])
def test_a_rate_set_later_is_checked(lr: float) -> None:
    p = nn.Parameter(torch.ones(2))
    optimizer = FusedAdan([p])
    p.grad = torch.ones(2)
    optimizer.step()
    before = bits(optimizer, [p])
    optimizer.param_groups[0]["lr"] = lr
    with pytest.raises(UserError, match=r"lr: got .*, expected a finite number of 0 or more"):
        optimizer.step()
    assert same(before, bits(optimizer, [p]))


def test_an_average_that_is_the_parameter_is_refused() -> None:
    p = nn.Parameter(torch.ones(2))
    with pytest.raises(UserError, match=r"params\[0\]: is the parameter itself or shares its memory"):
        FusedAdan([p]).add_ema([p.detach()], 0.9)
