"""The Triton kernels in Triton's interpreter: run with ``TRITON_INTERPRET=1`` (``make test`` does).

Forward and every gradient against float64, in float32 and float16: odd widths and lengths, uniform and
ragged, NaN-poisoned outputs, the same bits in two runs. B samples, L tokens, R rows, D width.
"""

from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from mdt_fast import kernels
from mdt_fast.kernels.backends import INTERPRETING
from mdt_fast.kernels.bias_gelu import reference as bias_gelu_reference
from mdt_fast.kernels.ln_modulate import reference
from mdt_fast.kernels.ln_modulate.registered import ln_modulate_fwd
from mdt_fast.kernels.tokens import reference as tokens_reference
from mdt_fast.masking import MaskPlan
from parity import compare, poisoned, same
from tolerances import FLOAT32, relative_error

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.skipif(not INTERPRETING, reason="needs TRITON_INTERPRET=1 in the environment"),
]

UNIFORM = [(1, 1, 4), (2, 5, 24), (3, 7, 72), (2, 3, 200)]
RAGGED = [([0, 3], 24), ([0, 4, 4, 9], 72), ([0, 1, 6, 6], 40)]


@pytest.fixture(autouse=True)
def _poison(monkeypatch: pytest.MonkeyPatch) -> Any:
    with poisoned(monkeypatch):
        yield


def arguments(rows: tuple[int, ...], B: int, D: int, gated: bool, seed: int = 0) -> list[Tensor]:
    """x, (y, gate,) shift, scale; the modulations are columns of one tensor, as in a model."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, *rows, D, generator=generator)
    gate, shift, scale = torch.randn(B, 3 * D, generator=generator).chunk(3, dim=1)
    return [x[0], x[1], gate, shift, scale] if gated else [x[0], shift, scale]


def check(gated: bool, args: list[Tensor], dtype: torch.dtype, offsets: Tensor | None = None) -> None:
    name = "gate_residual_ln_modulate" if gated else "ln_modulate"
    op, plain = getattr(kernels, name), getattr(reference, name)
    compare(partial(op, offsets=offsets), partial(plain, offsets=offsets, eps=1e-6), args, dtype)


DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
GATED = pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])


@DTYPES
@GATED
@pytest.mark.parametrize(("B", "L", "D"), UNIFORM)
def test_ln_modulate_uniform(B: int, L: int, D: int, gated: bool, dtype: torch.dtype) -> None:
    check(gated, arguments((B, L), B, D, gated), dtype)


@DTYPES
@GATED
@pytest.mark.parametrize(("bounds", "D"), RAGGED)
def test_ln_modulate_ragged(bounds: list[int], D: int, gated: bool, dtype: torch.dtype) -> None:
    offsets = torch.tensor(bounds, dtype=torch.int32)
    check(gated, arguments((bounds[-1],), len(bounds) - 1, D, gated), dtype, offsets)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
# From 8 on: the gradient of two normalised numbers is zero but for eps, which float32 cannot resolve.
@given(st.integers(1, 3), st.integers(0, 6), st.integers(8, 70), st.booleans(), st.integers(0, 99))
def test_ln_modulate_random_shapes(B: int, L: int, D: int, gated: bool, seed: int) -> None:
    check(gated, arguments((B, L), B, D, gated, seed), torch.float32)


@pytest.mark.parametrize("which", [0, 1], ids=["residual", "normal"])
def test_one_result_alone(which: int) -> None:
    """The other has no gradient, nor have the statistics that the op keeps for its backward pass."""
    args = [a.requires_grad_() for a in arguments((2, 5), 2, 24, gated=True)]
    weights = torch.randn(2, 5, 24)
    found, expected = (
        torch.autograd.grad(op(*args)[which], args, weights, allow_unused=True, materialize_grads=True)
        for op in (
            kernels.gate_residual_ln_modulate,
            partial(reference.gate_residual_ln_modulate, offsets=None, eps=1e-6),
        )
    )
    assert all(relative_error(a, b) < FLOAT32 for a, b in zip(found, expected, strict=True))
    x, y, *modulations = args
    kept = ln_modulate_fwd(x.flatten(0, 1), y.flatten(0, 1), *modulations, None, 1e-6, torch.float32)
    assert [a.requires_grad for a in kept] == [True, True, False, False]


@DTYPES
@pytest.mark.parametrize("shape", [(1, 4), (7, 24), (2, 17, 72), (3, 5, 300)], ids=str)
def test_bias_gelu(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    args = [3 * torch.randn(shape), torch.randn(shape[-1])]
    compare(kernels.bias_gelu, bias_gelu_reference.bias_gelu, args, dtype)


def test_bias_gelu_far_from_zero() -> None:
    x = torch.tensor([[-1e4, -30.0, -5.0, 0.0, 5.0, 30.0, 1e4]], requires_grad=True)
    out = kernels.bias_gelu(x, torch.zeros(7))
    assert torch.equal(out[0, [0, 1, 3, 5, 6]], torch.tensor([0.0, 0.0, 0.0, 30.0, 1e4]))
    (gradient,) = torch.autograd.grad(out.sum(), x)
    assert torch.equal(gradient[0, [0, 1, 5, 6]], torch.tensor([0.0, 0.0, 1.0, 1.0]))
    x = torch.tensor([[-1e30, -1e14, 1e14, 1e30]], requires_grad=True)
    (gradient,) = torch.autograd.grad(kernels.bias_gelu(x, torch.zeros(4)).sum(), x)
    assert torch.equal(gradient[0], torch.tensor([0.0, 0.0, 1.0, 1.0]))


def test_bias_gelu_of_nothing() -> None:
    bias = torch.randn(8, requires_grad=True)
    out = kernels.bias_gelu(torch.randn(0, 8), bias)
    out.sum().backward()
    assert out.shape == (0, 8)
    assert torch.equal(bias.grad, torch.zeros(8))


def test_bias_gelu_opcheck_and_compile() -> None:
    from mdt_fast.kernels.bias_gelu.registered import bias_gelu_fwd

    args = [torch.randn(5, 24, requires_grad=True), torch.randn(24, requires_grad=True)]
    torch.library.opcheck(bias_gelu_fwd.overload, tuple(args))
    compiled = torch.compile(kernels.bias_gelu, fullgraph=True, backend="aot_eager")
    same(kernels.bias_gelu, compiled, args)


@DTYPES
@pytest.mark.parametrize(
    ("B", "L", "K", "D"), [(1, 1, 1, 4), (3, 9, 4, 24), (2, 7, 0, 8), (2, 7, 7, 72), (2, 5, 2, 200)]
)
def test_unmask_tokens(B: int, L: int, K: int, D: int, dtype: torch.dtype) -> None:
    plan = MaskPlan.from_noise(torch.rand(B, L), K).sorted()
    args = [torch.randn(B, K, D), torch.randn(1, 1, D), torch.randn(1, L, D)]
    ids = {"ids_restore_BL": plan.ids_restore}
    compare(
        partial(kernels.unmask_tokens, **ids), partial(tokens_reference.unmask_tokens, **ids), args, dtype
    )


def test_unmask_tokens_opcheck_and_compile() -> None:
    from mdt_fast.kernels.tokens.triton_op import unmask_tokens_fwd

    plan = MaskPlan.from_noise(torch.rand(2, 9), 4)
    args = [torch.randn(shape, requires_grad=True) for shape in ((2, 4, 8), (1, 1, 8), (1, 9, 8))]
    torch.library.opcheck(unmask_tokens_fwd.overload, (*args, plan.ids_restore))
    op = partial(kernels.unmask_tokens, ids_restore_BL=plan.ids_restore)
    same(op, torch.compile(op, fullgraph=True, backend="aot_eager"), args)


@pytest.mark.parametrize("gated", [False, True])
def test_opcheck(gated: bool) -> None:
    from mdt_fast.kernels.ln_modulate.registered import ln_modulate_fwd

    x, y, gate, shift, scale = (a.requires_grad_() for a in arguments((6,), 2, 24, True))
    optional = (y, gate) if gated else (None, None)
    torch.library.opcheck(ln_modulate_fwd.overload, (x, *optional, shift, scale, None, 1e-6, torch.float32))


def test_compiles_without_graph_breaks() -> None:
    args = [a.requires_grad_() for a in arguments((2, 5), 2, 24, True)]
    compiled = torch.compile(kernels.gate_residual_ln_modulate, fullgraph=True, backend="aot_eager")
    same(kernels.gate_residual_ln_modulate, compiled, args)


def test_under_activation_checkpointing() -> None:
    args = arguments((2, 5), 2, 24, True)

    def checkpointed(*a: Tensor) -> tuple[Tensor, ...]:
        return torch.utils.checkpoint.checkpoint(kernels.gate_residual_ln_modulate, *a, use_reentrant=False)

    same(kernels.gate_residual_ln_modulate, checkpointed, args)


def test_too_wide() -> None:
    with pytest.raises(ValueError, match="x: width 8193, the Triton kernel takes at most 8192"):
        kernels.ln_modulate(torch.zeros(1, 1, 8193), torch.zeros(1, 8193), torch.zeros(1, 8193))
