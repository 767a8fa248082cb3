"""A modulated normal or a GELU with a linear layer behind it: gradients, and what is kept for backward."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mdt_fast import kernels
from mdt_fast.kernels.bias_gelu import reference as gelu_reference
from mdt_fast.kernels.ln_modulate import reference as ln_reference
from parity import compare, run, same
from tolerances import FLOAT32, FLOAT64, relative_error

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
RAGGED = pytest.mark.parametrize("lengths", [None, (3, 2), (0, 5), (5, 0)], ids=str)


def plain_ln(x: Tensor, shift: Tensor, scale: Tensor, w: Tensor, b: Tensor, offsets: Any = None) -> Tensor:
    return F.linear(ln_reference.ln_modulate(x, shift, scale, offsets, 1e-6), w, b)


def plain_gated(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    w: Tensor,
    b: Tensor,
    offsets: Any = None,
) -> tuple[Tensor, Tensor]:
    residual, normal = ln_reference.gate_residual_ln_modulate(x, y, gate, shift, scale, offsets, 1e-6)
    return residual, F.linear(normal, w, b)


def plain_activated(*args: Any, **offsets: Any) -> tuple[Tensor, Tensor]:
    residual, out = plain_gated(*args, **offsets)
    return residual, F.gelu(out, approximate="tanh")


def plain_residual(x: Tensor, *args: Tensor, offsets: Any = None) -> tuple[Tensor, Tensor]:
    return x, plain_ln(x, *args, offsets=offsets)


def plain_gelu(x: Tensor, bias: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.linear(gelu_reference.bias_gelu(x, bias), w, b)


def inputs(lengths: tuple[int, ...] | None, D: int, gated: bool) -> tuple[list[Tensor], dict[str, Any]]:
    """Arguments, and offsets if samples differ in length."""
    torch.manual_seed(0)
    shape = (2, 5, D) if lengths is None else (sum(lengths), D)
    x = [torch.randn(shape)] * (1 + gated)
    offsets = {} if lengths is None else {"offsets": torch.tensor([0, *lengths]).cumsum(0).int()}
    return [*(torch.randn_like(a) for a in x), *torch.randn(2 + gated, 2, D).unbind()], offsets


def layer(D: int, wide: int = 12) -> list[Tensor]:
    return [torch.randn(wide, D) * D**-0.5, torch.randn(wide)]


@DTYPES
@RAGGED
@pytest.mark.parametrize("D", [1, 24, 72])
def test_ln_modulate_linear(lengths: tuple[int, ...] | None, D: int, dtype: torch.dtype) -> None:
    args, offsets = inputs(lengths, D, gated=False)
    ours, plain = (partial(f, **offsets) for f in (kernels.ln_modulate_linear, plain_ln))
    compare(ours, plain, [*args, *layer(D)], dtype)


@DTYPES
@RAGGED
@pytest.mark.parametrize("D", [1, 24, 72])
def test_residual_ln_modulate_linear(lengths: tuple[int, ...] | None, D: int, dtype: torch.dtype) -> None:
    args, offsets = inputs(lengths, D, gated=False)
    ours, plain = (partial(f, **offsets) for f in (kernels.residual_ln_modulate_linear, plain_residual))
    compare(ours, plain, [*args, *layer(D)], dtype)


@pytest.mark.parametrize("used", [0, 1])
@pytest.mark.parametrize("form", ["residual", "gated"])
def test_one_of_two_outputs_used(form: str, used: int) -> None:
    ours, plain, gated = FORMS[form]
    args = arguments(gated)
    results = [run(lambda *a, f=f: f(*a)[used], args) for f in (ours, plain)]
    for a, e in zip(*results, strict=True):
        assert relative_error(a, e) <= FLOAT32


@DTYPES
@RAGGED
@pytest.mark.parametrize("D", [24, 72])
def test_gate_residual_ln_modulate_linear(
    lengths: tuple[int, ...] | None, D: int, dtype: torch.dtype
) -> None:
    args, offsets = inputs(lengths, D, gated=True)
    ours, plain = (partial(f, **offsets) for f in (kernels.gate_residual_ln_modulate_linear, plain_gated))
    compare(ours, plain, [*args, *layer(D)], dtype)


@DTYPES
@pytest.mark.parametrize("lengths", [None, (0, 5), (0, 0)], ids=str)
def test_activated_with_gradients_and_without(lengths: tuple[int, ...] | None, dtype: torch.dtype) -> None:
    args, offsets = inputs(lengths, 24, gated=True)
    args += layer(24)
    ours = partial(kernels.gate_residual_ln_modulate_linear, **offsets, gelu=True)
    plain = partial(plain_activated, **offsets)
    compare(ours, plain, args, dtype)
    args = [a.to(dtype) for a in args]
    with_gradients = run(ours, args)[:2]
    for a, e in zip(ours(*args), with_gradients, strict=True):
        assert relative_error(a, e) <= FLOAT32


@DTYPES
@RAGGED
@pytest.mark.parametrize("D", [1, 72])
def test_gate_residual(lengths: tuple[int, ...] | None, D: int, dtype: torch.dtype) -> None:
    args, offsets = inputs(lengths, D, gated=True)
    plain = partial(ln_reference.gate_residual, offsets=offsets.get("offsets"))
    compare(partial(kernels.gate_residual, **offsets), plain, args[:3], dtype)


@DTYPES
@pytest.mark.parametrize("shape", [(2, 5, 24), (7, 96), (0, 8)], ids=str)
def test_gelu_linear(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    compare(
        kernels.gelu_linear,
        plain_gelu,
        [torch.randn(shape), torch.randn(shape[-1]), *layer(shape[-1])],
        dtype,
    )


FORMS: dict[str, tuple[Callable[..., Any], Callable[..., Any], bool | None]] = {
    "ln": (kernels.ln_modulate_linear, plain_ln, False),
    "residual": (kernels.residual_ln_modulate_linear, plain_residual, False),
    "gated": (kernels.gate_residual_ln_modulate_linear, plain_gated, True),
    "activated": (partial(kernels.gate_residual_ln_modulate_linear, gelu=True), plain_activated, True),
    "gelu": (kernels.gelu_linear, plain_gelu, None),
}
FORMS |= {
    f"{form}, kept": (partial(ours, recompute=False), plain, gated)
    for form, (ours, plain, gated) in FORMS.items()
}


def arguments(gated: bool | None, D: int = 24) -> list[Tensor]:
    if gated is None:
        return [torch.randn(2, 5, D), torch.randn(D), *layer(D)]
    return [*inputs(None, D, gated)[0], *layer(D)]


@pytest.mark.parametrize("form", FORMS)
def test_float64(form: str) -> None:
    ours, plain, gated = FORMS[form]
    args = [a.double() for a in arguments(gated)]
    for a, e in zip(run(ours, args), run(plain, args), strict=True):
        assert relative_error(a, e) < FLOAT64


@pytest.mark.parametrize("form", FORMS)
def test_compiles_and_can_be_checkpointed(form: str) -> None:
    ours, _, gated = FORMS[form]
    args = arguments(gated)
    same(ours, torch.compile(ours, fullgraph=True, backend="aot_eager", dynamic=True), args)
    checkpointed = partial(torch.utils.checkpoint.checkpoint, ours, use_reentrant=False)
    same(ours, checkpointed, args)


@pytest.mark.parametrize("again", ["", ", kept"])
@pytest.mark.parametrize(("form", "rows"), [("ln", 1), ("residual", 1), ("gated", 2), ("gelu", 1)])
def test_what_is_kept(form: str, rows: int, again: str) -> None:
    """Only ``rows`` tensors of the input's size are kept; normal or activation only without recompute."""
    ours, _, gated = FORMS[form + again]
    rows += bool(again)
    args = [a.requires_grad_() for a in arguments(gated, D=240)]
    size, kept = args[0].numel(), {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: kept.setdefault((x.untyped_storage().data_ptr(), x.numel()), x), lambda x: x
    ):
        ours(*args)
    assert sum(x.numel() == size for x in kept.values()) == rows


@pytest.mark.parametrize("form", FORMS)
def test_autocast_casts_the_layer(form: str) -> None:
    ours, plain, gated = FORMS[form]
    args = [a.requires_grad_() for a in arguments(gated)]

    def last(f: Callable[..., Any]) -> Tensor:
        out = f(*args)
        return out[-1] if isinstance(out, tuple) else out

    exact = last(plain)
    with torch.autocast("cpu", torch.float16):
        actual, half = last(ours), last(plain)
    assert actual.dtype == torch.float16
    assert relative_error(actual, exact) <= 2 * max(relative_error(half, exact), 2**-11)
    actual.float().sum().backward()
    assert all(a.grad.dtype == torch.float32 and a.grad.isfinite().all() for a in args if a.grad is not None)


@pytest.mark.parametrize("form", FORMS)
def test_a_frozen_layer_gets_no_gradient(form: str) -> None:
    ours, _, gated = FORMS[form]
    args = arguments(gated)
    x = args[0].requires_grad_()
    out = ours(*args)
    (out[-1] if isinstance(out, tuple) else out).sum().backward()
    assert x.grad is not None
    assert all(a.grad is None for a in args[1:])


def test_wrong_arguments() -> None:
    x, shift, scale, w, b = arguments(False)
    with pytest.raises(ValueError, match=r"weight: shape \[12, 23\], expected \[O, 24\]"):
        kernels.ln_modulate_linear(x, shift, scale, w[:, :23], b)
    with pytest.raises(ValueError, match=r"bias: shape \[3\], expected \[12\]"):
        kernels.ln_modulate_linear(x, shift, scale, w, b[:3])
    with pytest.raises(ValueError, match=r"weight: torch.float64 on cpu, but x is torch.float32"):
        kernels.gelu_linear(x, shift[0], w.double(), b)
    with pytest.raises(ValueError, match=r"bias_F: shape \[12\], expected \[24\]"):
        kernels.gelu_linear(x, b, w, b)
    with pytest.raises(ValueError, match=r"y: shape \[2, 4, 24\], expected \[2, 5, 24\]"):
        kernels.gate_residual(x, x[:, :4], shift)


@pytest.mark.parametrize("form", FORMS)
def test_a_second_derivative_is_refused(form: str) -> None:
    """Casts and statistics are kept without their history, so a second derivative would lack terms."""
    ours, _, gated = FORMS[form]
    args = [a.double().requires_grad_() for a in arguments(gated)]
    out = ours(*args)
    (gradient,) = torch.autograd.grad(
        (out[-1] if isinstance(out, tuple) else out).square().sum(), args[:1], create_graph=True
    )
    with pytest.raises(RuntimeError, match="no second derivative"):
        gradient.sum().backward()


@pytest.mark.parametrize("length", [5, 12])
def test_a_backward_pass_under_vmap(length: int) -> None:
    args = [a.requires_grad_() for a in [*inputs(None, 24, False)[0], *layer(24)]]
    args[0] = torch.randn(2, length, 24, requires_grad=True)
    results = []
    for f in (kernels.ln_modulate_linear, plain_ln):
        out, directions = f(*args), torch.randn(3, 2, length, 12, generator=torch.Generator().manual_seed(1))
        results.append(
            torch.func.vmap(lambda v, out=out: torch.autograd.grad(out, args, v, retain_graph=True))(
                directions
            )
        )
    for a, e in zip(*results, strict=True):
        assert relative_error(a, e) <= FLOAT32


@pytest.mark.parametrize("form", FORMS)
def test_float64_beside_other_dtypes_under_autocast(form: str) -> None:
    ours, _, gated = FORMS[form]
    args = arguments(gated)
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(ValueError, match=r"weight: torch.float64 on cpu, but x is torch.float32"):
            ours(*args[:-2], args[-2].double(), args[-1])
        with pytest.raises(ValueError, match=r"weight: torch.float32 on cpu, but x is torch.float64"):
            ours(args[0].double(), *args[1:])


def test_the_residual_alone() -> None:
    """The layer is not touched: no gradients of zeros, and no NaN from a row that is not finite."""
    args = [a.requires_grad_() for a in arguments(False)]
    with torch.no_grad():
        args[0][0, 0, 0] = torch.inf
    kernels.residual_ln_modulate_linear(*args)[0].sum().backward()
    assert torch.equal(args[0].grad, torch.ones_like(args[0]))
    assert all(a.grad is None for a in args[1:])
