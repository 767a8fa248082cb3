"""Rounding to float8, within its precision, and products of the rounded numbers, which are exact.

R rows, D columns, O outputs, B samples.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from mdt_fast import kernels
from mdt_fast.kernels.float8 import reference
from mdt_fast.kernels.float8.registered import multiply, quantize_rows_fwd, quantize_weight_fwd
from mdt_fast.kernels.launches import columns, forced, shape_class
from parity import poisoned, run
from tolerances import FLOAT32, relative_error

FLOAT16 = 2.0**-10
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
SHAPES = pytest.mark.parametrize(("R", "D"), [(1, 1), (3, 24), (70, 300), (9, 1152), (0, 8)], ids=str)


def spread(R: int, D: int) -> Tensor:
    """Numbers of many magnitudes, with some rows of zeros."""
    torch.manual_seed(0)
    x = torch.randn(R, D) * torch.exp2(torch.randint(-12, 3, (R, 1)).float())
    x[1::4] = 0
    return x


def gelu(x: Tensor) -> Tensor:
    return torch.nn.functional.gelu(x, approximate="tanh")


FORMS: dict[str, Callable[[Tensor, Tensor], tuple[dict[str, Tensor], Tensor]]] = {
    "rows": lambda x, _: ({}, x),
    "gelu": lambda x, v: ({"gelu_bias": v}, gelu(x.double() + v.double())),
    "factor": lambda x, v: ({"factor": v}, x.double() * v.double()),
}


@DTYPES
@SHAPES
@pytest.mark.parametrize("form", FORMS)
def test_rows(form: str, R: int, D: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Float8's nearest numbers, scaled by the smallest power of two that keeps them all in range."""
    how, exact = FORMS[form](spread(R, D).to(dtype), torch.randn(D).to(dtype))
    with poisoned(monkeypatch):
        rows, scale = kernels.quantize_rows(spread(R, D).to(dtype), **how)
    assert rows.dtype == torch.float8_e4m3fn
    assert scale.dtype == torch.float32
    assert torch.equal(scale.log2(), scale.log2().round())
    most = rows.float().abs().amax(1)
    full = (exact.abs().amax(1) > 1e-30).to(most.dtype)
    assert (most <= 448).all()
    assert (most >= 216 * full).all()  # with half the scale, the largest would be out of range
    error = (rows.double() * scale.double()[:, None] - exact.double()).abs()
    # Half a step of 3 bits or of the smallest numbers, plus the error of float32 or half types before it.
    half_a_step = (exact.abs().double() / 16).maximum(scale.double()[:, None] * 2.0**-10)
    assert (
        error <= half_a_step + exact.abs().double() * (FLOAT32 if dtype == torch.float32 else 2**-8)
    ).all()


@DTYPES
@pytest.mark.parametrize(("outputs", "D"), [(1, 16), (40, 24), (17, 300)], ids=str)
def test_weights(outputs: int, D: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The weight is rounded as rows are; its columns are the same numbers, transposed."""
    weight = spread(outputs, D).to(dtype)
    with poisoned(monkeypatch):
        rows, columns, scale = kernels.quantize_weight(weight)
    expected, expected_scale = reference.quantize_rows(weight, None, None)
    assert torch.equal(rows.float(), expected.float())
    assert torch.equal(columns.float(), expected.float().t())
    assert torch.equal(scale, expected_scale)
    assert not kernels.quantize_weight(weight, columns=False)[1].numel()


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_what_is_not_finite_is_never_hidden(bad: float) -> None:
    """A non-finite number makes its whole row of the product NaN; the other rows stay finite."""
    x, weight = torch.randn(3, 32), torch.randn(16, 32)
    x[1, 5] = bad
    out = kernels.linear(x, weight, float8=True)
    assert out[1].isnan().all()
    assert out[[0, 2]].isfinite().all()
    weight[2, 7] = bad
    assert kernels.linear(x, weight, float8=True)[0].isnan().tolist() == [i == 2 for i in range(16)]
    x, g = torch.randn(3, 32, requires_grad=True), torch.ones(3, 16)
    g[1, 3] = bad
    (dx,) = torch.autograd.grad(kernels.linear(x, weight[:, :], float8=True), x, g)
    assert dx[1].isnan().all()


def few_programs(D: int, dtype: torch.dtype) -> Any:
    """So few programs that each takes several rows."""
    return forced(("quantize_rows", shape_class(columns(D), dtype.itemsize == 2)), {"programs": 4})


def test_more_rows_than_programs() -> None:
    x = spread(21, 3)
    with few_programs(3, x.dtype):
        ours = kernels.quantize_rows(x)
    for a, e in zip(ours, reference.quantize_rows(x, None, None), strict=True):
        assert torch.equal(a.float(), e.float())


def test_rows_apart() -> None:
    """Strided, transposed and expanded inputs give what contiguous copies give."""
    wide, v = spread(40, 96), torch.randn(96)
    for x in (wide[:, ::2], wide.t()[:48], wide[:1].expand(40, 96)[:, :48]):
        for how in ({}, {"gelu_bias": v[:: 96 // x.shape[1]]}, {"factor": v[:: 96 // x.shape[1]]}):
            how = {name: vector[: x.shape[1]] for name, vector in how.items()}
            ours = kernels.quantize_rows(x, **how)
            theirs = kernels.quantize_rows(x.clone(), **{name: b.clone() for name, b in how.items()})
            assert all(torch.equal(a.float(), b.float()) for a, b in zip(ours, theirs, strict=True))
        ours, theirs = kernels.quantize_weight(x), kernels.quantize_weight(x.clone())
        assert all(torch.equal(a.float(), b.float()) for a, b in zip(ours, theirs, strict=True))
    x, weight = torch.randn(48, 10).t(), torch.randn(48, 32).t()
    expected = kernels.linear(x.clone(), weight.clone(), float8=True)
    assert torch.equal(kernels.linear(x, weight, float8=True), expected)


def test_nothing_to_round() -> None:
    rows, scale = kernels.quantize_rows(torch.ones(64, 0))
    assert rows.shape == (64, 0)
    assert (scale == 1).all()
    assert (kernels.quantize_weight(torch.ones(5, 0))[2] == 1).all()
    assert kernels.quantize_rows(torch.ones(0, 5))[1].shape == (0,)


def test_rounding_has_no_gradient() -> None:
    x = torch.randn(3, 8, requires_grad=True)
    assert not any(part.requires_grad for part in (*kernels.quantize_rows(x), *kernels.quantize_weight(x)))


def test_float64_is_rounded_as_float32() -> None:
    """What float32 cannot hold becomes NaN if too large, zero if too small."""
    rows, scale = kernels.quantize_rows(torch.tensor([[1e300, 1.0], [1e-60, 1e-61], [0.3, 0.1]]).double())
    assert scale.isnan().tolist() == [True, False, False]
    assert rows.float()[1].tolist() == [0, 0]
    assert torch.equal(rows.float()[2:], kernels.quantize_rows(torch.tensor([[0.3, 0.1]]))[0].float())


def test_the_smallest_and_the_largest() -> None:
    x = torch.tensor([[1e-45, 0, 1e-40], [3e38, -3e38, 1], [448, 449, 0], [0.875, 0.5, 0], [0.8751, 0.5, 0]])
    rows, scale = kernels.quantize_rows(x)
    assert scale.log2().tolist() == [-126, 120, 1, -9, -8]
    assert rows.float()[1:].tolist() == [
        [224, -224, 0], [224, 224, 0], [448, 256, 0], [224, 128, 0]
    ]  # fmt: skip


def rounded(x: Tensor, factor: Tensor | None = None) -> Tensor:
    """What float8 holds of ``x``, in float64."""
    rows, scale = reference.quantize_rows(x, None, factor)
    return rows.double() * scale.double()[:, None]


def exact_linear(x: Tensor, weight: Tensor, bias: Tensor, dout: Tensor) -> list[Tensor]:
    """From rounded operands, in float64: output; gradients of x, weight (from unrounded ones), bias."""
    held, scale = rounded(weight), reference.quantize_rows(weight, None, None)[1]
    dx = rounded(dout, scale) @ (held / scale.double()[:, None])
    return [
        rounded(x) @ held.t() + bias.double(), dx, dout.double().t() @ x.double(), dout.double().sum(0)
    ]  # fmt: skip


@DTYPES
@pytest.mark.parametrize(("R", "D", "outputs"), [(1, 16, 16), (33, 48, 32), (0, 16, 32)], ids=str)
def test_linear(R: int, D: int, outputs: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, weight, bias, dout = (
        torch.randn(shape).to(dtype) for shape in ((R, D), (outputs, D), (outputs,), (R, outputs))
    )
    leaves = [a.clone().requires_grad_() for a in (x, weight, bias)]
    out = kernels.linear(*leaves, float8=True)
    ours = [out, *torch.autograd.grad(out, leaves, dout)]
    allowed = FLOAT32 if dtype == torch.float32 else FLOAT16
    for a, e in zip(ours, exact_linear(x, weight, bias, dout), strict=True):
        assert a.dtype == dtype
        assert relative_error(a, e) <= allowed


def layer(D: int, outputs: int) -> list[Tensor]:
    return [torch.randn(outputs, D) * D**-0.5, torch.randn(outputs)]


@DTYPES
@pytest.mark.parametrize(("R", "D"), [(1, 16), (9, 300), (21, 3), (0, 8), (5, 0)], ids=str)
def test_sums_beside(R: int, D: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sums are of the unrounded rows, in an order fixed by the shape: two runs give the same bits."""
    x, factor = torch.randn(R, D).to(dtype), torch.rand(D) + 1
    for sums in (torch.float32, dtype):
        with poisoned(monkeypatch), few_programs(D, dtype):
            rows, scale, ours = quantize_rows_fwd(x, None, factor, sums)
            again = quantize_rows_fwd(x, None, factor, sums)[2]
        assert ours.dtype == sums
        assert torch.equal(ours, again)
        assert relative_error(ours, x.double().sum(0)) <= (FLOAT32 if sums == torch.float32 else FLOAT16)
        for a, e in zip((rows, scale), kernels.quantize_rows(x, factor=factor), strict=True):
            assert torch.equal(a.float(), e.float())


@DTYPES
def test_small_gradients_are_not_lost(dtype: torch.dtype) -> None:
    """Gradients that float16 could not hold beside their scales survive, under float16 autocast too."""
    torch.manual_seed(0)
    x, weight = torch.randn(64, 16).requires_grad_(), (torch.randn(32, 16) * 0.02).requires_grad_()
    dout = (torch.randn(64, 32) * 1e-3).to(torch.float16)
    with torch.autocast("cpu", torch.float16):
        out = kernels.linear(x, weight, float8=True)
        (dx,) = torch.autograd.grad(out, x, dout)
    exact = dout.double() @ weight.double()
    assert (dx - exact).norm() < 0.06 * exact.norm()
    leaf = x.detach().to(dtype).requires_grad_()
    (dx,) = torch.autograd.grad(kernels.linear(leaf, weight.to(dtype), float8=True), leaf, dout.to(dtype))
    assert (dx - exact).norm() < 0.06 * exact.norm()


def test_the_weight_is_rounded_from_its_own_dtype() -> None:
    """Not from autocast's dtype, which is coarser."""
    x, weight = torch.randn(5, 32).bfloat16(), torch.randn(16, 32)
    rows, _, scale = kernels.quantize_weight(weight)
    coarse, _, coarse_scale = kernels.quantize_weight(weight.bfloat16())
    assert not torch.equal(rows.float(), coarse.float())
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        ours = kernels.linear(x, weight, float8=True)
        assert torch.equal(ours, kernels.linear(x, weight, float8=(rows, scale)))
        assert not torch.equal(ours, kernels.linear(x, weight, float8=(coarse, coarse_scale)))


@pytest.mark.parametrize("chosen", [(0,), (1,), (2,), (0, 2), (1, 2)], ids=str)
def test_gradients_of_some_arguments(chosen: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    args = [torch.randn(9, 32), *layer(32, 16)]
    every = [a.clone().requires_grad_() for a in args]
    some = [a.clone().requires_grad_(i in chosen) for i, a in enumerate(args)]
    dout = torch.randn(9, 16)
    expected = torch.autograd.grad(kernels.linear(*every, float8=True), every, dout)
    ours = torch.autograd.grad(kernels.linear(*some, float8=True), [some[i] for i in chosen], dout)
    assert all(torch.equal(a, expected[i]) for i, a in zip(chosen, ours, strict=True))


FUSED: dict[str, Callable[[int], tuple[Any, Any, list[Tensor]]]] = {
    "gelu_linear": lambda D: (
        kernels.gelu_linear,
        lambda x, b, *layer, **how: kernels.linear(kernels.bias_gelu(x, b), *layer, **how),
        [torch.randn(3, 7, D), torch.randn(D), *layer(D, 32)],
    ),
    "ln_modulate_linear": lambda D: (
        kernels.ln_modulate_linear,
        lambda x, s, c, *layer, **how: kernels.linear(kernels.ln_modulate(x, s, c), *layer, **how),
        [torch.randn(3, 7, D), *torch.randn(2, 3, D), *layer(D, 32)],
    ),
    "gate_residual_ln_modulate_linear": lambda D: (
        kernels.gate_residual_ln_modulate_linear,
        gated,
        [*torch.randn(2, 3, 7, D), *torch.randn(3, 3, D), *layer(D, 32)],
    ),
}


def gated(x: Tensor, y: Tensor, g: Tensor, s: Tensor, c: Tensor, *layer: Tensor, **how: Any) -> Any:
    residual, normal = kernels.gate_residual_ln_modulate(x, y, g, s, c)
    return residual, kernels.linear(normal, *layer, **how)


@pytest.mark.parametrize("recompute", [True, False], ids=["recompute", "kept"])
@pytest.mark.parametrize("D", [16, 80, 1152])
@pytest.mark.parametrize("name", FUSED)
def test_layers_behind_others(name: str, D: int, recompute: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs and gradients match those of the separate parts, except where float32's error decides a tie
    between two float8 numbers."""
    torch.manual_seed(0)
    fused, parts, args = FUSED[name](D)
    how = {} if recompute else {"recompute": False}
    with poisoned(monkeypatch):
        ours = run(partial(fused, float8=True, **how), args)
        again = run(partial(fused, float8=True, **how), args)
    theirs, unrounded = run(partial(parts, float8=True), args), run(parts, args)
    for a, b, e, u in zip(ours, again, theirs, unrounded, strict=True):
        assert torch.equal(a, b)
        assert (a - e).norm() <= 2e-3 * e.norm()
        assert (a - u).norm() <= 0.06 * u.norm()
    assert any((a - u).norm() > 1e-3 * u.norm() for a, u in zip(ours, unrounded, strict=True))


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("name", [*FUSED, "linear"])
def test_there_is_no_second_derivative(name: str, autocast: bool) -> None:
    """A second derivative raises an error; one that lacks the weight's part is never returned."""
    _, _, args = FUSED["gelu_linear" if name == "linear" else name](32)
    args = args[:1] + args[2:] if name == "linear" else args
    leaves = [a.requires_grad_() for a in args]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = getattr(kernels, name)(*leaves, float8=True)
    out = out[1] if isinstance(out, tuple) else out
    (slope,) = torch.autograd.grad(out.sum(), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(slope.square().sum() + leaves[-2].square().sum(), leaves[-2])


def test_gelu_behind_a_product_in_float8() -> None:
    """GELU runs after the product: no float8 product has it as an epilogue."""
    _, _, args = FUSED["gate_residual_ln_modulate_linear"](32)
    with torch.no_grad():
        plain = kernels.gate_residual_ln_modulate_linear(*args, float8=True)[1]
        activated = kernels.gate_residual_ln_modulate_linear(*args, float8=True, gelu=True)[1]
    assert torch.equal(activated, gelu(plain))


@pytest.mark.parametrize("lengths", [(3, 2), (0, 5), (0, 0)], ids=str)
def test_ragged(lengths: tuple[int, int]) -> None:
    R, m, w = sum(lengths), torch.randn(3, 2, 48), layer(48, 16)
    x, y = torch.randn(2, R, 48)
    offsets = torch.tensor([0, *lengths]).cumsum(0).int()
    fused = partial(kernels.gate_residual_ln_modulate_linear, offsets=offsets, float8=True)
    ours = run(fused, [x, y, *m, *w])
    start = 0
    for b, length in enumerate(lengths):
        rows = slice(start, start := start + length)
        alone = kernels.gate_residual_ln_modulate_linear(
            x[None, rows], y[None, rows], *m[:, b : b + 1], *w, float8=True
        )
        assert all(relative_error(o[rows], a[0]) < FLOAT32 for o, a in zip(ours[:2], alone, strict=True))


def test_the_activation_alone_is_left_out_of_memory() -> None:
    """Kept for a layer's backward pass: its input, and the float8 weight instead of a copy; no activation."""
    x, bias, (weight, b) = torch.randn(64, 48, requires_grad=True), torch.randn(48), layer(48, 32)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        kernels.gelu_linear(x, bias, weight.requires_grad_(), b, float8=True)
    own = {x.data_ptr(), bias.data_ptr(), weight.data_ptr()}
    new = {t.data_ptr(): t.nbytes for t in kept if t.data_ptr() not in own}
    assert sum(new.values()) == weight.numel() + 4 * sum(weight.shape)


def test_compiled() -> None:
    """Compiles to one graph for any number of rows, with the gradients of eager code."""
    fused, _, args = FUSED["gelu_linear"](32)
    torch._dynamo.reset()
    compiled = torch.compile(partial(fused, float8=True), fullgraph=True, dynamic=True, backend="aot_eager")
    for a, e in zip(run(compiled, args), run(partial(fused, float8=True), args), strict=True):
        assert relative_error(a, e) < FLOAT32
    with torch.no_grad():
        assert relative_error(compiled(*args), fused(*args, float8=True)) < FLOAT32


def test_opcheck() -> None:
    """All but the schema check, in which PyTorch would multiply float8 tensors."""
    checks = "test_autograd_registration", "test_faketensor"
    x, weight, v = torch.randn(5, 32), torch.randn(16, 32), torch.randn(32)
    for args in ((x, None, None, None), (x, v, None, None), (x, None, v, torch.float32)):
        torch.library.opcheck(quantize_rows_fwd.overload, args, test_utils=checks)
    torch.library.opcheck(quantize_weight_fwd.overload, (weight, True), test_utils=checks)
    (rows, scale), (held, _, scales) = kernels.quantize_rows(x), kernels.quantize_weight(weight)
    operands = rows, scale, held, scales, None, torch.float32
    torch.library.opcheck(multiply.overload, operands, test_utils=checks)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: kernels.quantize_rows(torch.ones(3)), r"x: shape \[3\], expected \[R, D\]"),
        (lambda: kernels.quantize_rows(torch.ones(3, 4).long()), "x: dtype torch.int64"),
        (
            lambda: kernels.quantize_rows(torch.ones(3, 4), factor=torch.ones(3)),
            r"factor: shape \[3\], expected \[4\]",
        ),
        (
            lambda: kernels.quantize_rows(torch.ones(3, 4), gelu_bias=torch.ones(4).long()),
            "gelu_bias: torch.int64 on cpu",
        ),
        (lambda: kernels.quantize_weight([1.0]), "weight: got list"),  # type: ignore[arg-type]
        (
            lambda: kernels.linear(torch.ones(3, 4), torch.ones(5, 3), float8=True),
            r"weight: shape \[5, 3\], expected \[O, 4\]",
        ),
        (
            lambda: kernels.linear(torch.ones(3, 24), torch.ones(16, 24), float8=True),
            r"weight: shape \[16, 24\], for float8 both are multiples of 16",
        ),
        (
            lambda: kernels.linear(torch.ones(3, 16), torch.ones(16, 16), float8="yes"),  # type: ignore[arg-type]
            "float8: got 'yes', expected True, False or a weight's rows and scales",
        ),
    ],
    ids=["shape", "dtype", "factor", "bias", "list", "weight", "width", "word"],
)  # fmt: skip
def test_wrong_arguments(call: Callable[[], Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        call()
