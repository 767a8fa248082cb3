"""``skip_linear`` and ``patch_skip_linear`` against the concatenation: forward and every gradient."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mdt_fast.kernels import patch_skip_linear, skip_linear
from mdt_fast.kernels.skip_linear.gemm_op import skip_linear as in_place  # CUDA's form; it runs anywhere
from mdt_fast.kernels.skip_linear.gemm_op import skip_linear_fwd
from parity import compare, same
from tolerances import FLOAT32, FLOAT64, relative_error


def concatenated(x: Tensor, skip: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.linear(torch.cat([x, skip], dim=-1), weight, bias)


def arguments(B: int, L: int, D: int, width: int) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(s) for s in ((B, L, D), (B, L, D), (width, 2 * D), (width,))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", [skip_linear, in_place])
@pytest.mark.parametrize(("B", "L", "D", "width"), [(1, 1, 1, 1), (2, 7, 24, 24), (3, 5, 72, 40)])
def test_against_the_concatenation(op, B: int, L: int, D: int, width: int, dtype: torch.dtype) -> None:
    compare(op, concatenated, arguments(B, L, D, width), dtype)


@pytest.mark.parametrize("op", [skip_linear, in_place])
@pytest.mark.parametrize(("B", "L"), [(0, 4), (2, 0)])
def test_nothing(op, B: int, L: int) -> None:
    args = [a.requires_grad_() for a in arguments(B, L, 8, 6)]
    out = op(*args)
    assert out.shape == (B, L, 6)
    for argument, gradient in zip(args, torch.autograd.grad(out.sum(), args), strict=True):
        assert gradient.shape == argument.shape
        assert not gradient.any()


def test_opcheck_compile_and_checkpoint() -> None:
    args = [a.requires_grad_() for a in arguments(1, 6, 8, 8)]
    torch.library.opcheck(skip_linear_fwd.overload, (args[0][0], args[1][0], args[2], args[3]))
    same(in_place, torch.compile(in_place, fullgraph=True, backend="aot_eager"), args)
    same(in_place, lambda *a: torch.utils.checkpoint.checkpoint(in_place, *a, use_reentrant=False), args)


def test_transforms_see_into_plain_pytorch_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """With tensors that claim to be on a GPU; ``test_gpu_transforms.py`` uses a real one."""
    x, *others = arguments(2, 4, 8, 3)
    expected = torch.func.jvp(lambda x: concatenated(x, *others), (x,), (x,))
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    found = torch.func.jvp(lambda x: skip_linear(x, *others), (x,), (x,))
    assert all(relative_error(a, b) < FLOAT32 for a, b in zip(found, expected, strict=True))
    gradient = torch.func.grad(lambda x: skip_linear(x, *others).sum())(x)
    assert relative_error(gradient, others[1][:, :8].sum(0).expand_as(x)) < FLOAT32


@pytest.mark.parametrize("op", [skip_linear, in_place])
def test_under_autocast(op) -> None:  # type: ignore[no-untyped-def]
    """Like a linear layer: gradients stay float32, and a float64 model is left alone."""
    args = [a.requires_grad_() for a in arguments(2, 5, 16, 24)]
    with torch.autocast("cpu", torch.bfloat16):
        out, expected = op(*args), concatenated(*args)
        mixed = op(args[0].bfloat16(), *args[1:])
        double = op(*(a.double() for a in args))
    assert out.dtype == mixed.dtype == torch.bfloat16
    assert double.dtype == torch.float64
    assert relative_error(out, expected) <= 2 * torch.finfo(torch.bfloat16).eps
    for ours, plain in zip(
        torch.autograd.grad(out.float().sum(), args),
        torch.autograd.grad(expected.float().sum(), args),
        strict=True,
    ):
        assert ours.dtype == torch.float32
        assert relative_error(ours, plain) <= 2 * torch.finfo(torch.bfloat16).eps


def embedded(x, patches, embed_weight, embed_bias, pos, weight, bias) -> Tensor:  # type: ignore[no-untyped-def]
    return skip_linear(x, F.linear(patches, embed_weight, embed_bias) + pos, weight, bias)


def patch_arguments(B: int, L: int, D: int, P: int, width: int) -> list[Tensor]:
    torch.manual_seed(0)
    shapes = ((B, L, D), (B, L, P), (D, P), (D,), (1, L, D), (width, 2 * D), (width,))
    return [torch.randn(s) for s in shapes]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sizes", [(1, 1, 3, 1, 2), (2, 9, 24, 16, 24), (3, 4, 72, 64, 40)], ids=str)
def test_rank_p_form(sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    compare(patch_skip_linear, embedded, patch_arguments(*sizes), dtype)


def test_rank_p_form_is_exact() -> None:
    args = [a.double().requires_grad_() for a in patch_arguments(2, 9, 24, 16, 24)]
    ours, expected = patch_skip_linear(*args), embedded(*args)
    assert relative_error(ours, expected) <= FLOAT64
    weights = torch.randn_like(ours)
    gradients = (torch.autograd.grad((out * weights).sum(), args) for out in (ours, expected))
    for a, e in zip(*gradients, strict=True):
        assert relative_error(a, e) <= FLOAT64


def test_rank_p_form_needs_fewer_flops() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    import mdt_fast.kernels.linear.flops  # noqa: F401 (formulas of our own products)

    counts = []
    for op in (patch_skip_linear, embedded):
        with FlopCounterMode(display=False) as counter:
            op(*patch_arguments(8, 64, 96, 16, 96))
        counts.append(counter.get_total_flops())
    assert counts[0] < 0.7 * counts[1]


@pytest.mark.parametrize(
    ("position", "shape", "message"),
    [
        (0, (4, 8), r"skip: shape \[1, 4, 8\], expected \[4, 8\]"),
        (1, (1, 4, 7), r"skip: shape \[1, 4, 7\], expected \[1, 4, 8\]"),
        (2, (8, 8), r"weight: shape \[8, 8\], expected \[O, 16\]"),
        (3, (9,), r"bias: shape \[9\], expected \[8\]"),
    ],
)
def test_refusals(position: int, shape: tuple[int, ...], message: str) -> None:
    args = arguments(1, 4, 8, 8)
    args[position] = torch.zeros(shape)
    with pytest.raises(ValueError, match=message):
        skip_linear(*args)


@pytest.mark.parametrize("name", ["patches", "embed_weight", "embed_bias", "pos", "weight", "bias"])
def test_rank_p_refusals(name: str) -> None:
    names = ["x", "patches", "embed_weight", "embed_bias", "pos", "weight", "bias"]
    args = patch_arguments(2, 4, 8, 16, 8)
    args[names.index(name)] = torch.zeros(3, 3, 3, 3)
    with pytest.raises(ValueError, match=rf"{name}: shape \[3, 3, 3, 3\], expected"):
        patch_skip_linear(*args)
    args = patch_arguments(2, 4, 8, 16, 8)
    args[names.index(name)] = args[names.index(name)].double()
    with pytest.raises(ValueError, match=f"{name}: torch.float64 on cpu, but x is torch.float32 on cpu"):
        patch_skip_linear(*args)


def test_float32_is_float32() -> None:
    args = arguments(2, 7, 96, 96)
    exact = concatenated(*(a.double() for a in args))
    assert relative_error(skip_linear(*args), exact) <= FLOAT32
