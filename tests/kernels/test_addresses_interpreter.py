"""In Triton's interpreter: elements more than 2^31 apart, more tiles than a grid's second axis holds.

What lies in between is allocated but never touched, so it takes addresses and no memory.
"""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mdt_fast.kernels import gate_residual, gate_residual_ln_modulate, ln_modulate, rel_attention
from mdt_fast.kernels.backends import INTERPRETING
from mdt_fast.kernels.ln_modulate import reference
from tolerances import relative_error

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.skipif(not INTERPRETING, reason="needs TRITON_INTERPRET=1 in the environment"),
]

FAR = 2**30


def far_apart(shape: tuple[int, ...], strides: tuple[int, ...]) -> Tensor:
    """Random float16 numbers at these strides."""
    span = 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    try:
        whole = torch.empty(span, dtype=torch.float16)
    except RuntimeError:
        pytest.skip("this machine does not give out addresses without memory behind them")
    x = whole.as_strided(shape, strides)
    return x.copy_(torch.randn(shape))


def test_modulations() -> None:
    """Slices of all layers' modulations: forward and gradients, with and without the gate."""
    B, L, D = 3, 2, 16
    torch.manual_seed(0)
    together = far_apart((B, 3 * D), (FAR, 1))
    x, y, dout = (torch.randn(B, L, D).half() for _ in range(3))

    def with_gradients(modulate: Any, *tensors: Tensor) -> list[Tensor]:
        leaves = [tensor.detach().requires_grad_() for tensor in tensors]
        outputs = modulate(*leaves)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        weights = [dout.to(out.dtype) for out in outputs]
        return [*outputs, *torch.autograd.grad(outputs, leaves, weights)]

    gate, shift, scale = together.chunk(3, dim=1)
    for ours, plain, tensors in (
        (ln_modulate, _plain, (x, shift, scale)),
        (gate_residual, _plain_gate, (x, y, gate)),
        (gate_residual_ln_modulate, _plain_both, (x, y, gate, shift, scale)),
    ):
        expected = with_gradients(plain, *(tensor.double().contiguous() for tensor in tensors))
        for a, b in zip(with_gradients(ours, *tensors), expected, strict=True):
            assert relative_error(a, b) < 2e-3


def _plain(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return reference.ln_modulate(x, shift, scale, None, 1e-6)


def _plain_gate(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    return x + gate[:, None] * y


def _plain_both(x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    residual = _plain_gate(x, y, gate)
    return residual, _plain(residual, shift, scale)


@pytest.mark.parametrize(
    ("heads", "rows", "strides"),
    [(3, 16, (0, FAR, 16, 1)), (1, 16, (0, 0, FAR // 4, 1))],
    ids=["heads first", "rows first"],
)
def test_attention(heads: int, rows: int, strides: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    q = far_apart((1, heads, rows, 16), strides).requires_grad_()
    k, v, dout = (torch.randn(1, heads, rows, 16).half() for _ in range(3))
    out = rel_attention(q, k, v, attention_backend="triton")
    (dq,) = torch.autograd.grad(out, q, dout)
    exact = q.detach().double().contiguous().requires_grad_()
    expected = F.scaled_dot_product_attention(exact, k.double(), v.double())
    assert relative_error(out, expected) < 2e-3
    assert relative_error(dq, *torch.autograd.grad(expected, exact, dout.double())) < 2e-3


@pytest.mark.parametrize("table_grad", ["recompute", "store"])
def test_attention_of_rows_that_are_copied(table_grad: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if rows lay too far apart; the output's gradient has another layout than the output."""
    from mdt_fast.kernels.rel_attention import launch

    monkeypatch.setattr(launch, "aligned", lambda x, length: x.clone(memory_format=torch.contiguous_format))
    torch.manual_seed(0)
    tensors = [*torch.randn(3, 2, 3, 9, 16).half(), torch.randn(28, 3).half()]
    dout = torch.randn(2, 9, 3, 16).half().transpose(1, 2)
    found = []
    for how in ({"attention_backend": "triton", "table_grad": table_grad}, {"attention_backend": "sdpa"}):
        leaves = [tensor.clone().requires_grad_() for tensor in tensors]
        out = rel_attention(*leaves, grid_size=3, **how)
        found.append(torch.autograd.grad(out, leaves, dout))
    for ours, plain in zip(*found, strict=True):
        assert relative_error(ours, plain) < 2e-3


def test_of_a_packed_batch_its_longest_sample_counts() -> None:
    """Offsets start at a sample's first row, so the number of samples before it does not matter."""
    from mdt_fast.kernels.rel_attention.launch import aligned

    packed = far_apart((1, 1, 3, 16), (0, 16, FAR, 1))
    assert aligned(packed, length=2) is packed
    assert aligned(packed, length=3).is_contiguous()


def test_no_tile_stands_on_an_axis_that_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second and third axis of a CUDA grid hold 65,535 blocks, so neither carries rows or columns."""
    from mdt_fast.kernels.bias_gelu import launch as gelu
    from mdt_fast.kernels.sums import launch as sums

    grids: list[tuple[int, ...]] = []

    class Kernel:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            grids.append(grid)
            return lambda *_, **__: None

    monkeypatch.setattr(gelu, "bias_gelu_fwd_kernel", Kernel())
    monkeypatch.setattr(sums, "sum_chunks_kernel", Kernel())
    x = torch.empty(1, dtype=torch.float16).expand(2**22, 256)
    gelu.bias_gelu_fwd(x, x[:1], x)
    wide = torch.empty(1, dtype=torch.float16).expand(4, 2**24)
    sums.sum_rows(wide, wide[0])
    assert len(grids) >= 2
    assert all(n <= 65_535 for grid in grids for n in grid[1:])
