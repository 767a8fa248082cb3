"""Operators that are plain function calls unless something, such as tracing, looks at them."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from mdt_fast.kernels import (
    gate_residual_ln_modulate,
    gelu_linear,
    launches,
    ln_modulate_linear,
    rel_attention,
    rel_attention_qkvpacked,
)
from mdt_fast.kernels.linear.op import Linear
from mdt_fast.kernels.registry import Op, applied, on_their_device, registered
from tiny import needs_csrc

CALLS: list[str] = []


@registered("mdt_fast::tests_cube")
def cube(x: Tensor, factor: float) -> Tensor:
    CALLS.append("cube")
    return factor * x * x * x


@registered("mdt_fast::tests_cube_bwd")
def cube_bwd(dout: Tensor, x: Tensor, factor: float) -> Tensor:
    return 3 * factor * x * x * dout


cube.register_fake(lambda x, factor: torch.empty_like(x))
cube_bwd.register_fake(lambda dout, x, factor: torch.empty_like(x))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0])
    ctx.factor = inputs[1]


def _backward(ctx: Any, dout: Tensor) -> tuple[Tensor, None]:
    return cube_bwd(dout, *ctx.saved_tensors, ctx.factor), None


cube.register_autograd(_backward, setup_context=_setup_context)


@pytest.fixture
def dispatched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Records which ops go through the dispatcher."""
    seen: list[str] = []
    for op in (cube, cube_bwd):

        def call(*args: Any, op: Op = op, overload: Any = op.overload, **kwargs: Any) -> Any:
            seen.append(op.name.partition("::")[2])
            return overload(*args, **kwargs)

        monkeypatch.setattr(op, "overload", call)
    return seen


def test_eager_code_calls_the_function(dispatched: list[str]) -> None:
    x = torch.randn(3, requires_grad=True)
    out = cube(x, 2.0)
    out.sum().backward()
    assert torch.equal(out, 2 * x * x * x)
    assert torch.equal(x.grad, 6 * x * x)
    with torch.no_grad():
        assert cube(x, 2.0).grad_fn is None
    assert not dispatched


def test_what_looks_at_operators_sees_them(dispatched: list[str]) -> None:
    x = torch.randn(3)
    with FlopCounterMode(display=False):
        cube(x, 2.0)
    torch.func.vmap(lambda row: cube(row, 2.0))(torch.randn(2, 3))
    torch._vmap_internals._vmap(lambda row: cube(row, 2.0))(torch.randn(2, 3))
    torch.jit.trace(lambda x: cube(x, 2.0), (x,), check_trace=False)
    cube(x, factor=2.0)
    assert dispatched == ["tests_cube"] * 5


def test_tensors_without_numbers_are_not_computed_with() -> None:
    CALLS.clear()
    assert cube(torch.empty(3, device="meta"), 2.0).device.type == "meta"
    from torch._subclasses.fake_tensor import FakeTensorMode

    mode = FakeTensorMode()
    fake = mode.from_tensor(torch.randn(3))
    assert cube(fake, 2.0).shape == (3,)
    assert not CALLS


def test_a_subclass_is_not_taken_for_its_memory(dispatched: list[str]) -> None:
    class Marked(Tensor):
        pass

    cube(torch.randn(3).as_subclass(Marked), 2.0)
    cube(torch.nn.Parameter(torch.randn(3)), 2.0)
    assert dispatched == ["tests_cube"]


def test_launched_where_the_tensors_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if that is not the current GPU, on which Triton launches whatever tensors it gets."""
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    current = [0]

    @contextmanager
    def device(there: torch.device) -> Iterator[None]:
        before, current[0] = current[0], there.index
        yield
        current[0] = before

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "device", device)
    seen = on_their_device(lambda *args: current[0])
    mode = FakeTensorMode()
    on = [FakeTensor(mode, torch.empty(3, device="meta"), torch.device("cuda", i)) for i in (0, 1, 1)]
    assert seen(None, 2.0, on[0]) == 0
    assert seen(None, 2.0, on[1], on[2]) == 1
    assert seen(torch.randn(3)) == seen(2.0) == current[0] == 0
    assert inspect.unwrap(cube.function) is not cube.function  # ops are wrapped in this way


def test_compiled_and_checked_as_an_operator() -> None:
    x = torch.randn(3, requires_grad=True)
    compiled = torch.compile(lambda x: cube(x, 2.0) + 1, fullgraph=True, backend="aot_eager")
    (gradient,) = torch.autograd.grad(compiled(x).sum(), x)
    assert torch.equal(gradient, 6 * x * x)
    torch.library.opcheck(cube.overload, (x, 2.0))


@pytest.mark.parametrize("mode", [nullcontext, lambda: FlopCounterMode(display=False)], ids=["plain", "mode"])
@pytest.mark.parametrize("linear", [True, False], ids=["constant gradient", "gradient"])
def test_a_second_derivative_is_an_error_and_never_left_out(mode: Any, linear: bool) -> None:
    x = torch.randn(3, requires_grad=True)
    with mode():
        out = cube(x, 2.0)
        loss = out.sum() if linear else out.square().sum()
        (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
        with pytest.raises(RuntimeError, match="no second derivative"):
            (loss + gradient.square().sum()).backward()
        with pytest.raises(RuntimeError, match="tests_cube_bwd: has no derivative"):
            cube_bwd(x, x, 2.0)


@pytest.mark.parametrize("op", ["linear", "attention", "gelu"])
def test_no_second_derivative_of_any_room(op: str) -> None:
    x, weight = torch.randn(2, 16, 3, 2, 8, requires_grad=True), torch.randn(4, 8)
    bias, flat = torch.zeros(8), torch.randn(5, 8, requires_grad=True)
    calls = {
        "linear": lambda: (flat, ln_modulate_linear(flat[None], bias[None], bias[None], weight)),
        "attention": lambda: (x, rel_attention_qkvpacked(x, attention_backend="samples")),
        "gelu": lambda: (flat, gelu_linear(flat, bias, weight)),
    }
    leaf, out = calls[op]()
    (gradient,) = torch.autograd.grad(out.sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        (out.sum() + gradient.square().sum()).backward()


def test_a_second_derivative_of_what_was_cast_is_no_constant() -> None:
    """Under autocast a GPU's product saves rounded copies of its inputs, without their history."""
    x, weight = torch.randn(8, 16, requires_grad=True), torch.randn(4, 16, requires_grad=True)
    out = Linear.apply(x, weight, None, torch.bfloat16, False)
    (slope,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    for ask in (
        lambda: (slope.square().sum() + weight.square().sum()).backward(retain_graph=True),
        lambda: torch.autograd.grad(slope.square().sum() + weight.square().sum(), weight),
    ):
        with pytest.raises(RuntimeError, match="no second derivative"):
            ask()


def test_saved_tensors_are_unpacked_once() -> None:
    x, weight, bias = torch.randn(5, 8, requires_grad=True), torch.randn(4, 8), torch.zeros(8)
    unpacked: list[int] = []

    def unpack(tensor: Tensor) -> Tensor:
        unpacked.append(id(tensor))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, unpack):
        out = gelu_linear(x, bias, weight)
    torch.autograd.grad(out.sum(), x, create_graph=True)
    assert len(unpacked) == len(set(unpacked)) > 0


def test_a_checkpoint_whose_residual_alone_is_used() -> None:
    x, y, *modulations = (*torch.randn(2, 2, 5, 8), *torch.randn(3, 2, 8))
    gradients = []
    for call in (
        gate_residual_ln_modulate,
        partial(checkpoint, gate_residual_ln_modulate, use_reentrant=False),
    ):
        leaves = [a.clone().requires_grad_() for a in (x, y, *modulations)]
        residual, _ = call(*leaves)
        gradients.append(torch.autograd.grad(residual.square().sum(), leaves[:3]))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_attention_whose_output_has_no_gradient() -> None:
    class Ends(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, dout: Tensor) -> None:
            return None

    x = torch.randn(2, 16, 3, 2, 8, requires_grad=True)
    out = rel_attention_qkvpacked(x, attention_backend="samples")
    (Ends.apply(out).sum() + x.sum()).backward()
    assert torch.equal(x.grad, torch.ones_like(x))
    q = torch.randn(2, 2, 16, 8, requires_grad=True)
    (Ends.apply(rel_attention(q, q, q, attention_backend="samples")).sum() + q.sum()).backward()
    assert torch.equal(q.grad, torch.ones_like(q))


def test_names_in_traces() -> None:
    assert cube(torch.randn(3, requires_grad=True), 2.0).grad_fn.name() == "mdt_fast_tests_cubeBackward"


def test_a_lazy_sign_is_not_overlooked(dispatched: list[str]) -> None:
    x = torch.randn(3)
    assert torch.equal(cube(torch._neg_view(x), 2.0), 2.0 * (-x) ** 3)
    assert dispatched == ["tests_cube"]


def test_whole_numbers_of_other_libraries() -> None:
    qkv, pos = torch.randn(7, 3, 2, 8), torch.arange(7) % 4
    offsets, table = torch.tensor([0, 4, 7], dtype=torch.int32), torch.randn(12, 2)
    expected, *others = (
        rel_attention_qkvpacked(qkv, table, grid_size=kind(2), pos=pos, offsets=offsets, max_length=kind(4))
        for kind in (int, np.int64, torch.tensor)
    )
    assert all(torch.equal(other, expected) for other in others)
    with pytest.raises(ValueError, match="max_length: got"):
        rel_attention_qkvpacked(qkv, table, grid_size=2, pos=pos, offsets=offsets, max_length=4.0)


def test_a_step_of_autograd_without_gradients_is_its_forward_pass() -> None:
    contexts: list[bool] = []

    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            contexts.append(isinstance(ctx, torch.autograd.function.FunctionCtx))
            ctx.set_materialize_grads(False)
            ctx.save_for_backward(x)
            ctx.note = "kept for the backward pass"
            return 2 * x

        @staticmethod
        def backward(ctx: Any, dout: Tensor) -> Tensor:
            return 2 * dout

    x = torch.randn(3, requires_grad=True)
    assert applied(Double, x).grad_fn is not None
    assert torch.equal(applied(Double, x.detach()), 2 * x)
    with torch.no_grad():
        assert torch.equal(applied(Double, x), 2 * x)
    assert contexts == [True, False, False]


def test_an_op_within_a_step_of_autograd_asks_no_more_than_the_step_has(dispatched: list[str]) -> None:
    called: list[Any] = []

    class Cubed(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            called.append(cube.within(ctx))
            return called[-1](x, 2.0)

        @staticmethod
        def backward(ctx: Any, dout: Tensor) -> Tensor:
            return dout

    x = torch.randn(3)
    assert torch.equal(applied(Cubed, x), 2 * x * x * x)
    with FlopCounterMode(display=False):
        applied(Cubed, x)
    assert dispatched == ["tests_cube"]
    applied(Cubed, x.requires_grad_())
    assert called == [cube.function, cube, cube]


@needs_csrc
def test_what_looks_at_operators_sees_those_of_a_layer_too() -> None:
    seen: list[str] = []

    class Seeing(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    x, m, weight, bias = torch.randn(2, 3, 32), torch.randn(2, 32), torch.randn(8, 32), torch.randn(8)
    with Seeing():
        ln_modulate_linear(x, m, m, weight, bias)
        gelu_linear(x, torch.randn(32), weight, bias)
    assert [name for name in seen if name.startswith("mdt_fast.")] == [
        "mdt_fast.ln_modulate.default", "mdt_fast.bias_gelu.default"
    ]  # fmt: skip


def test_launch_choices_are_looked_up_once_and_again_for_the_tuner() -> None:
    made: list[int] = []

    def make(rows: int, *, block: int = 16) -> int:
        made.append(rows)
        return rows // block

    x = torch.zeros(1)
    assert [launches.chosen(make, "any", x, 64, 32) for _ in range(3)] == [2, 2, 2]
    with launches.forced(("any", "64 float32"), {"block": 8}):
        assert launches.chosen(make, "any", x, 64, 32) == 4
    assert launches.chosen(make, "any", x, 64, 32) == 2
    assert made == [32, 32, 32]
