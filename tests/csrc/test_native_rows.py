"""csrc's adaLN and GELU on the CPU against float64: dtypes, mixed ones, odd widths, ragged rows."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mdt_fast import kernels
from mdt_fast.kernels.backends import uses_csrc
from mdt_fast.kernels.bias_gelu import reference as gelu_reference
from mdt_fast.kernels.ln_modulate import reference as ln_reference
from mdt_fast.kernels.native import MISSING, library, vector_bits
from parity import compare, run
from tolerances import HALF_FACTOR, relative_error

pytestmark = pytest.mark.skipif(not library("cpu"), reason=f"the C++ ops are {MISSING['cpu']}")
CPUINFO = Path("/proc/cpuinfo")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


@pytest.mark.skipif(
    not (CPUINFO.exists() and library("cpu") and vector_bits()), reason="one code for all processors"
)
def test_the_widest_vectors_are_chosen() -> None:
    """On any maker's processor: code for a named processor would be taken on that very model only."""
    flags = set(re.findall(r"\w+", CPUINFO.read_text()))
    widest = 512 if "avx512f" in flags else 256 if "avx2" in flags else 128
    assert vector_bits() == widest


def offsets_of(*lengths: int) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


@DTYPES
@pytest.mark.parametrize("D", [1, 3, 17, 72, 384, 1153])
@pytest.mark.parametrize("lengths", [(5,), (40, 0, 33, 1)], ids=str)
def test_adaln(dtype: torch.dtype, D: int, lengths: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    R, B = sum(lengths), len(lengths)
    x, y = torch.randn(2, R, D).unbind()
    gate, shift, scale = torch.randn(3, B, D).unbind()
    offsets = offsets_of(*lengths)
    assert uses_csrc(x.to(dtype))

    def ours(*args: Tensor) -> Any:
        return kernels.gate_residual_ln_modulate(*args, offsets=offsets)

    def plain(*args: Tensor) -> Any:
        return ln_reference.gate_residual_ln_modulate(*args, offsets, 1e-6)

    compare(ours, plain, [x, y, gate, shift, scale], dtype)


@DTYPES
@pytest.mark.parametrize(("R", "F"), [(1, 1), (33, 17), (100, 300), (0, 8)])
def test_gelu(dtype: torch.dtype, R: int, F: int) -> None:
    torch.manual_seed(0)
    compare(kernels.bias_gelu, gelu_reference.bias_gelu, [3 * torch.randn(R, F), torch.randn(F)], dtype)


def test_gelu_everywhere() -> None:
    """From far below zero to far above, infinity and NaN."""
    x = torch.cat([torch.linspace(-30, 30, 20001), torch.tensor([-1e30, -1e4, 1e4, 1e30, 3e38])])[None]
    exact = torch.nn.functional.gelu(x.double(), approximate="tanh")
    actual = kernels.bias_gelu(x, torch.zeros(x.shape[1]))
    allowed = 2e-6 * exact.abs() + 1e-12
    assert ((actual - exact).abs() <= allowed)[:, :20001].all()
    assert torch.equal(actual[0, 20001:], torch.tensor([-0.0, -0.0, 1e4, 1e30, 3e38]))
    edge = torch.tensor([[torch.inf, torch.nan]])
    assert kernels.bias_gelu(edge, torch.zeros(2)).tolist()[0][0] == torch.inf
    assert kernels.bias_gelu(edge, torch.zeros(2)).isnan().tolist() == [[False, True]]
    far = torch.tensor([[-1e30, 1e30]], requires_grad=True)
    kernels.bias_gelu(far, torch.zeros(2)).sum().backward()
    assert far.grad.tolist() == [[0.0, 1.0]]


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
def test_mixed_dtypes(half: torch.dtype) -> None:
    """As under autocast: a float32 residual stream, and half precision from all linear layers."""
    torch.manual_seed(0)
    x, y = torch.randn(7, 24), torch.randn(7, 24).to(half)
    modulations = [m.to(half) for m in torch.randn(3, 2, 24)]
    offsets = offsets_of(4, 3)
    leaves = [a.requires_grad_() for a in (x, y, *modulations)]
    outputs = kernels.gate_residual_ln_modulate(*leaves, offsets=offsets)
    assert [o.dtype for o in outputs] == [torch.float32] * 2
    weights = [torch.randn(7, 24) for _ in outputs]
    grads = torch.autograd.grad(sum((o * w).sum() for o, w in zip(outputs, weights)), leaves)
    exact = [a.detach().double().requires_grad_() for a in leaves]
    expected = ln_reference.gate_residual_ln_modulate(*exact, offsets, 1e-6)
    wanted = torch.autograd.grad(sum((o * w).sum() for o, w in zip(expected, weights)), exact)
    for a, e in zip((*outputs, *grads), (*expected, *wanted), strict=True):
        assert relative_error(a, e) <= HALF_FACTOR * torch.finfo(a.dtype).eps + 1e-5


def test_modulations_in_chunks_and_no_copies_of_them() -> None:
    wide = torch.randn(3, 6 * 40)
    shift, scale = wide.chunk(6, dim=1)[2:4]
    x = torch.randn(3, 5, 40)
    args = [x, shift, scale]
    ours, plain = run(kernels.ln_modulate, args), run(kernels.ln_modulate, [x, shift.clone(), scale.clone()])
    assert all(torch.equal(a, b) for a, b in zip(ours, plain))


def test_bad_sizes_are_refused_by_the_op_itself() -> None:
    x, m = torch.randn(4, 8), torch.randn(2, 8)
    out, mean, rstd = torch.empty(4, 8), torch.empty(4), torch.empty(4)
    call = torch.ops.mdt_fast.ln_modulate_fwd_cpu
    for wrong in (
        (x, None, None, m[:, :4], m, None, 1e-6, None, out, mean, rstd),
        (x, None, None, m, m, None, 1e-6, None, out[:3], mean, rstd),
        (x, None, None, m, m, None, 1e-6, None, out, mean[:3], rstd),
        (x, None, None, m, m, torch.tensor([0, 5, 4], dtype=torch.int32), 1e-6, None, out, mean, rstd),
        (x, None, None, m, m, torch.tensor([0, 2], dtype=torch.int32), 1e-6, None, out, mean, rstd),
        (x.double(), None, None, m, m, None, 1e-6, None, out, mean, rstd),
        (x, x, None, m, m, None, 1e-6, None, out, mean, rstd),
    ):
        with pytest.raises(RuntimeError, match="expected"):
            call(*wrong)
