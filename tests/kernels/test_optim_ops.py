"""The optimiser's ops alone: against their plain form in float64, and every refusal by its message."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mdt_fast.kernels import adamw_step, adan_step, grad_norm, grad_sumsq, native
from mdt_fast.kernels.optim import op, reference

SHAPES = [(33, 7), (), (0,), (5,)]
STEPS: dict[str, Callable[..., None]] = {"adan": adan_step, "adamw": adamw_step}
MOMENTS = {
    "adan": ("exp_avg", "exp_avg_diff", "exp_avg_sq", "neg_pre_grad"),
    "adamw": ("exp_avg", "exp_avg_sq"),
}


def arguments(name: str, dtype: torch.dtype = torch.float32, steps: int = 1) -> dict[str, Any]:
    """A whole call with one master weight and two averages; the same numbers in every dtype."""
    draw = torch.Generator().manual_seed(2)

    def tensors(to: torch.dtype = dtype) -> list[Tensor]:
        made = [torch.randn(shape, generator=draw, dtype=torch.float64) for shape in SHAPES]
        return [x.to(torch.bfloat16).to(to) for x in made]

    wide = torch.float64 if dtype == torch.float64 else torch.float32
    values: dict[str, Any] = {"params": tensors(), "grads": tensors()}
    values |= {moment: tensors(wide) for moment in MOMENTS[name]}
    values["exp_avg_sq"] = [x.abs() for x in values["exp_avg_sq"]]
    half = dtype == torch.bfloat16
    values["masters"] = [p.float() for p in values["params"]] if half else []
    values["emas"] = tensors(wide) + tensors(wide)
    values["steps"] = [torch.tensor(float(3 * i)) for i in range(steps)]
    values["lr"] = torch.tensor(0.125, dtype=wide)
    values["grad_norm"] = grad_norm(values["grads"])
    return values | {"weight_decay": 0.1, "max_grad_norm": 1.0, "ema_decays": [0.5, 0.875]}


def changed(values: dict[str, Any]) -> list[Tensor]:
    """Copies of all tensors in a call's lists."""
    lists = [value for value in values.values() if isinstance(value, list) and value]
    return [x.clone() for tensors in lists for x in tensors if isinstance(x, Tensor)]


@pytest.mark.parametrize("decay", [0.9999, 0.999999, 0.99999999])
@pytest.mark.parametrize("name", STEPS)
def test_an_average_moves_by_what_its_decay_leaves(name: str, decay: float) -> None:
    """By 1 - decay, which is lost once the decay is rounded to float32."""
    values = arguments(name) | {"ema_decays": [decay], "max_grad_norm": 0.0, "weight_decay": 0.0}
    values["emas"] = [torch.zeros_like(p) for p in values["params"]]
    STEPS[name](**values)
    for average, parameter in zip(values["emas"], values["params"], strict=True):
        assert torch.allclose(average.double(), (1 - decay) * parameter.double(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", STEPS)
def test_gradients_of_zero_are_clipped_without_an_epsilon(name: str, dtype: torch.dtype) -> None:
    values = arguments(name, dtype) | {"clip_eps": 0.0}
    values["grads"] = [torch.zeros_like(g) for g in values["grads"]]
    values["grad_norm"] = grad_norm(values["grads"])
    STEPS[name](**values)
    assert all(p.isfinite().all() for p in values["params"])


@pytest.mark.parametrize("serve", ["native", "reference"])
@pytest.mark.parametrize("steps", [1, len(SHAPES)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", STEPS)
def test_a_step_is_the_float64_references(
    name: str, dtype: torch.dtype, steps: int, serve: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if serve == "native" and not native.library("cpu"):
        pytest.skip("the native ops are not built")
    if serve == "reference":
        monkeypatch.setattr(op, "library", lambda device: False)
    values, exact = arguments(name, dtype, steps), arguments(name, torch.float64, steps)
    STEPS[name](**values)
    STEPS[name](**exact)
    if dtype == torch.bfloat16:
        for p, master in zip(values["params"], values["masters"]):
            assert torch.equal(p, master.bfloat16())
        values["params"] = values.pop("masters")
    for a, b in zip(changed(values), changed(exact), strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_norm(dtype: torch.dtype) -> None:
    grads = [torch.randn(301, 7).to(dtype), torch.randn(()).to(dtype), torch.zeros(0, dtype=dtype)]
    grads.append(torch.randn(4, 6)[:, ::2].to(dtype))
    exact = sum(float(g.double().square().sum()) for g in grads)
    assert grad_sumsq(grads).dtype == torch.float64
    assert grad_sumsq(grads).item() == pytest.approx(exact, rel=1e-12)
    assert grad_norm(grads).item() == pytest.approx(exact**0.5, rel=1e-12)
    assert grad_norm([]) == 0
    assert grad_norm([torch.full((2,), 3e38)]).isfinite()
    assert grad_norm([torch.tensor([1.0, float("nan")])]).isnan()
    assert reference.grad_sumsq([torch.tensor([float("inf")])]).isinf()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_norm_has_a_gradient(dtype: torch.dtype) -> None:
    """As a penalty on gradients needs it."""
    leaves = [torch.randn(5, 7).to(dtype).requires_grad_(), torch.randn(3).to(dtype).requires_grad_()]
    found = torch.autograd.grad(grad_norm(leaves), leaves)
    norm = grad_norm([leaf.detach() for leaf in leaves])
    transformed = torch.func.grad(lambda *x: grad_norm(x), argnums=(0, 1))(
        *(leaf.detach() for leaf in leaves)
    )
    for leaf, gradients in zip(leaves, zip(found, transformed, strict=True), strict=True):
        expected = leaf.detach().double() / norm
        for gradient in gradients:
            assert gradient.dtype == dtype
            torch.testing.assert_close(gradient.double(), expected, rtol=0.01, atol=1e-6)
    rows = torch.func.vmap(lambda x: grad_norm([x]))(leaves[0].detach())
    torch.testing.assert_close(rows, leaves[0].detach().double().norm(dim=1))
    with torch.no_grad():
        assert not grad_norm(leaves).requires_grad


def test_no_parameters_at_all() -> None:
    for name in STEPS:
        values = {key: [] if isinstance(value, list) else value for key, value in arguments(name).items()}
        STEPS[name](**values | {"steps": [torch.zeros(())]})


@pytest.mark.skipif(not native.library("cpu"), reason="the native ops are not built")
@pytest.mark.parametrize("name", STEPS)
def test_opcheck(name: str) -> None:
    values = arguments(name)
    last = ["no_prox"] if name == "adan" else []
    betas = ["beta1", "beta2", *(["beta3"] if name == "adan" else [])]
    defaults = STEPS[name].__kwdefaults__ or {}
    keys = ["params", "grads", *MOMENTS[name], "masters", "emas", "steps", "lr", "grad_norm", *betas, "eps",
            "weight_decay", *last, "max_grad_norm", "clip_eps", "ema_decays"]  # fmt: skip
    called = tuple(values.get(key, defaults.get(key)) for key in keys)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(getattr(torch.ops.mdt_fast, f"{name}_step"), called, test_utils=checks)
    torch.library.opcheck(torch.ops.mdt_fast.grad_sumsq, (values["grads"],), test_utils=checks)


def wrong() -> list[tuple[str, dict[str, Any], str]]:
    short, half = [torch.ones(33, 7)], [torch.ones(shape, dtype=torch.float16) for shape in SHAPES]
    doubles = [torch.ones(shape, dtype=torch.float64) for shape in SHAPES]
    reshaped = [torch.ones(7, 33), *(torch.ones(shape) for shape in SHAPES[1:])]
    bfloats = [torch.ones(shape, dtype=torch.bfloat16) for shape in SHAPES]
    return [
        ("beta", {"beta2": 1.0}, "beta2: got 1.0, expected [0, 1)"),
        ("decay", {"ema_decays": [0.5, -1.0]}, "ema_decays[1]: got -1.0, expected [0, 1)"),
        ("eps", {"eps": -1.0}, "eps: got -1.0, expected finite numbers of at least 0"),
        ("clip", {"max_grad_norm": float("nan")}, "max_grad_norm: got nan"),
        ("grads", {"grads": short}, "grads: 1 tensors, expected 4"),
        (
            "params dtype",
            {"params": half},
            "params[0]: torch.float16, expected torch.float32 or torch.bfloat16",
        ),
        ("grads dtype", {"grads": doubles}, "grads[0]: torch.float64, expected torch.float32"),
        ("shape", {"exp_avg": reshaped}, "exp_avg[0]: shape [7, 33], expected [33, 7]"),
        ("moments", {"exp_avg_sq": bfloats}, "exp_avg_sq: torch.bfloat16, but exp_avg is torch.float32"),
        ("mixed", {"grads": [bfloats[0], *reshaped[1:]]}, "grads[1]: torch.float32, expected"),
        ("masters", {"masters": reshaped}, "masters: 4 tensors, expected 0"),
        ("no masters", {"params": bfloats}, "masters: 0 tensors, expected 4"),
        ("averages", {"emas": short}, "emas: 1 tensors, expected 8"),
        ("averages' dtype", {"emas": bfloats * 2}, "emas[0]: torch.bfloat16, expected torch.float32"),
        ("steps", {"steps": []}, "steps: 0 tensors, expected 1 or 4"),
        (
            "step",
            {"steps": [torch.ones(2)]},
            "steps[0]: torch.float32 [2] on cpu, expected 0-dim torch.float32",
        ),
        ("lr", {"lr": torch.ones((), dtype=torch.float64)}, "lr: torch.float64 [] on cpu, expected 0-dim"),
        ("norm", {"grad_norm": torch.ones(())}, "grad_norm: torch.float32 [] on cpu, expected 0-dim"),
        ("device", {"exp_avg": [x.to("meta") for x in reshaped]}, "exp_avg[0]: "),
    ]


@pytest.mark.parametrize(("bad", "message"), [pytest.param(b, m, id=i) for i, b, m in wrong()])
@pytest.mark.parametrize("name", STEPS)
def test_wrong_arguments_change_nothing(name: str, bad: dict[str, Any], message: str) -> None:
    values = arguments(name)
    before = changed(values)
    with pytest.raises(ValueError, match=re.escape(message)):
        STEPS[name](**values | bad)
    assert all(torch.equal(a, b) for a, b in zip(changed(values), before))


def test_wrong_gradients() -> None:
    with pytest.raises(ValueError, match=r"grads\[1\]: torch.int64 on cpu, expected floating-point on cpu"):
        grad_norm([torch.ones(2), torch.ones(2, dtype=torch.int64)])
    for wrong, message in (
        (None, "got NoneType, expected a tensor"),
        (torch.eye(2).to_sparse(), "torch.sparse_coo, expected a dense tensor"),
        (torch.ones(2).to(torch.float8_e5m2), "torch.float8_e5m2 on cpu, expected floating-point on cpu"),
    ):
        with pytest.raises(ValueError, match=r"grads\[1\]: " + message):
            grad_norm([torch.ones(2), wrong])  # type: ignore[list-item]
    with pytest.raises(ValueError, match=r"grads\[1\]: torch.float32 on meta"):
        grad_sumsq([torch.ones(2), torch.ones(2, device="meta")])
