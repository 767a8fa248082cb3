"""Products of linear layers, by oneDNN or PyTorch: every gradient, and layouts that are slow in oneDNN."""

import io
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from mdt_fast.kernels import linear
from mdt_fast.kernels.linear import onednn, op
from parity import compare, same
from tolerances import FLOAT32, relative_error


@pytest.fixture(autouse=True)
def small_products_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """oneDNN serves small products, too, and on Intel's processors."""
    monkeypatch.setattr(onednn, "MIN_FLOPS", 0)
    monkeypatch.setattr(op, "MKL_SUFFICES", False)


ONEDNN = pytest.mark.skipif(not op.ONEDNN, reason="this torch has no oneDNN")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(1, 7), (64, 24), (2, 65, 72), (3, 0, 8), (70, 1)], ids=str)
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no bias"])
def test_forward_and_gradients(shape: tuple[int, ...], dtype: torch.dtype, with_bias: bool) -> None:
    torch.manual_seed(0)
    args = [torch.randn(shape), torch.randn(20, shape[-1])] + [torch.randn(20)] * with_bias
    compare(linear, F.linear, args, dtype)


@ONEDNN
@pytest.mark.parametrize("half", [0, 1])
def test_halves_of_a_wider_weight(half: int) -> None:
    """As in skip layers: part of a matrix, which oneDNN itself would multiply a thousand times slower."""
    weight = torch.randn(20, 48)

    def with_half(f, x: Tensor, w: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        return f(x, w.chunk(2, dim=1)[half])

    compare(
        partial(with_half, linear), partial(with_half, F.linear), [torch.randn(80, 24), weight], torch.float32
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", ["every third", "one for all"])
def test_a_bias_whose_numbers_lie_apart(layout: str, dtype: torch.dtype) -> None:
    """oneDNN assumes that they are contiguous."""

    def with_bias(f, x: Tensor, w: Tensor, b: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        return f(x, w, b[::3] if layout == "every third" else b[:1].expand(20))

    torch.manual_seed(0)
    args = [torch.randn(80, 24), torch.randn(20, 24), torch.randn(60)]
    compare(partial(with_bias, linear), partial(with_bias, F.linear), args, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_forward_mode_gradients(dtype: torch.dtype) -> None:
    """PyTorch's product is used: ours would give no tangents."""
    x, weight, bias = (a.to(dtype) for a in (torch.randn(80, 24), torch.randn(20, 24), torch.randn(20)))
    with forward_ad.dual_level():
        result = forward_ad.unpack_dual(linear(forward_ad.make_dual(x, x), weight, bias))
        assert result.tangent is not None
        assert torch.equal(result.tangent, F.linear(x, weight))


@ONEDNN
def test_who_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = torch.randn(64, 8), torch.randn(4, 8)
    assert op.uses_onednn(x, weight)
    assert not op.uses_onednn(x[:63], weight)
    assert not op.uses_onednn(x.double(), weight.double())
    assert not op.uses_onednn(x.to("meta"), weight.to("meta"))
    monkeypatch.setattr(op, "MKL_SUFFICES", True)
    assert not op.uses_onednn(x, weight)
    assert torch.equal(linear(x, weight), F.linear(x, weight))
    monkeypatch.setattr(op, "MKL_SUFFICES", False)
    expected = F.linear(x, weight)
    with torch.backends.mkldnn.flags(enabled=False):
        assert relative_error(linear(x, weight), expected) < FLOAT32


@pytest.mark.parametrize("maker", ["GenuineIntel", "AuthenticAMD", None])
def test_whose_processor_it_is(maker: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """From Linux's file; without it, from the name that Windows gives the processor."""

    def file(path: str) -> io.StringIO:
        if maker is None:
            raise FileNotFoundError(path)
        return io.StringIO(f"processor\t: 0\nvendor_id\t: {maker}\ncpu family\t: 6\n")

    monkeypatch.setattr("builtins.open", file)
    monkeypatch.setattr("platform.processor", lambda: "Intel64 Family 6 Model 143 Stepping 8, GenuineIntel")
    assert op.of_intel() == (maker != "AuthenticAMD")
    monkeypatch.setattr("platform.processor", lambda: "arm")
    assert op.of_intel() == (maker == "GenuineIntel")


@ONEDNN
def test_small_products_are_left_to_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onednn, "MIN_FLOPS", 2 * 64 * 8 * 4)
    x, weight = torch.randn(64, 8), torch.randn(4, 8)
    assert op.uses_onednn(x, weight)
    assert not op.uses_onednn(x, weight[:3])


@ONEDNN
def test_opcheck_and_compile() -> None:
    from mdt_fast.kernels.linear.onednn import linear_fwd

    args = [torch.randn(70, 8), torch.randn(4, 8), torch.randn(4)]
    torch.library.opcheck(linear_fwd.overload, tuple(a.requires_grad_() for a in args))
    same(linear, torch.compile(linear, fullgraph=True, backend="aot_eager", dynamic=True), args)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(1, 7), (70, 24), (0, 8), (70, 1)], ids=str)
@pytest.mark.parametrize("bias", ["side by side", "apart", None])
@pytest.mark.parametrize("size", ["small", "large"])
def test_gelu_as_the_epilogue(
    shape: tuple[int, int],
    dtype: torch.dtype,
    bias: str | None,
    size: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(onednn, "MIN_FLOPS", 0 if size == "large" else 1e8)
    torch.manual_seed(0)
    x, weight = torch.randn(shape).to(dtype), torch.randn(20, 2 * shape[1]).to(dtype)[:, shape[1] :]
    added = None if bias is None else torch.randn(40).to(dtype)[::2]
    added = added.contiguous() if added is not None and bias == "side by side" else added
    double = F.linear(x.double(), weight.double(), None if added is None else added.double())
    expected = F.gelu(double, approximate="tanh")
    tolerance = {torch.float64: 1e-12, torch.float32: FLOAT32}.get(dtype, 8e-3)
    for enabled in (True, False):
        with torch.backends.mkldnn.flags(enabled=enabled), torch.no_grad():
            out = op.product_gelu(x, weight, added)
        assert out.dtype == dtype
        assert relative_error(out, expected) < tolerance


@ONEDNN
def test_who_activates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onednn, "MIN_FLOPS", 2 * 64 * 8 * 4)
    x, weight = torch.randn(64, 8), torch.randn(4, 8)
    assert op.gelu_epilogue(x, weight)
    assert not op.gelu_epilogue(x[:63], weight)
    assert not op.gelu_epilogue(x.double(), weight.double())
    assert not op.gelu_epilogue(x.to("meta"), weight.to("meta"))


@ONEDNN
def test_opcheck_and_compile_of_the_epilogue() -> None:
    from mdt_fast.kernels.linear.onednn import linear_gelu_fwd

    args = [torch.randn(70, 8), torch.randn(4, 8), torch.randn(4)]
    torch.library.opcheck(linear_gelu_fwd.overload, tuple(args))
    compiled = torch.compile(op.product_gelu, fullgraph=True, backend="aot_eager", dynamic=True)
    assert relative_error(compiled(*args), op.product_gelu(*args)) < FLOAT32


def test_wrong_arguments() -> None:
    x, weight = torch.randn(3, 8), torch.randn(4, 8)
    with pytest.raises(ValueError, match=r"weight: shape \[4, 8\], expected \[O, 7\]"):
        linear(x[:, :7], weight)
    with pytest.raises(ValueError, match=r"weight: torch.float64 on cpu, but x is torch.float32"):
        linear(x, weight.double())
    with pytest.raises(ValueError, match=r"bias: shape \[3\], expected \[4\]"):
        linear(x, weight, torch.randn(3))
