"""What the tests of the fused optimisers share: parameters, gradients, and both implementations of a step."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mdt_fast.kernels import native
from mdt_fast.kernels.optim import op
from mdt_fast.optim import FusedAdamW, FusedAdan

Shapes = list[tuple[int, ...]]
SHAPES: Shapes = [(7, 5), (3,), (), (0, 4), (1,), (130, 17), (2, 3, 4)]
BOTH = pytest.mark.parametrize("cls", [FusedAdan, FusedAdamW])


@pytest.fixture(params=["native", "reference"])
def served(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each test that uses it runs with the native ops, where they are built, and with PyTorch alone."""
    if request.param == "native" and not native.library("cpu"):
        pytest.skip("the native ops are not built")
    if request.param == "reference":
        monkeypatch.setattr(op, "library", lambda device: False)
    return request.param


def parameters(
    dtype: torch.dtype = torch.float32, shapes: list[tuple[int, ...]] = SHAPES
) -> list[nn.Parameter]:
    draw = torch.Generator().manual_seed(1)
    return [nn.Parameter(torch.randn(shape, generator=draw).to(dtype)) for shape in shapes]


def set_grads(params: list[nn.Parameter], step: int, scale: float = 1.0) -> None:
    draw = torch.Generator().manual_seed(100 + step)
    for p in params:
        p.grad = (torch.randn(p.shape, generator=draw, dtype=torch.float64) * scale).to(p.dtype)


def run(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], count: int, first: int = 0) -> None:
    for step in range(first, first + count):
        set_grads(params, step)
        optimizer.step()


def assert_near(actual: list[Any], expected: list[Any], tolerance: float) -> None:
    for a, b in zip(actual, expected):
        torch.testing.assert_close(a.detach().double(), b.detach().double(), rtol=tolerance, atol=tolerance)


def bits(optimizer: torch.optim.Optimizer, params: list[nn.Parameter]) -> list[Tensor]:
    """Everything that a step may change, copied."""
    state = [value for p in params for value in optimizer.state[p].values()]
    counts = [group["step"] for group in optimizer.param_groups if "step" in group]
    averages = [ema for average in optimizer._averages for ema in average]  # type: ignore[attr-defined]
    return [tensor.detach().clone() for tensor in (*params, *state, *counts, *averages)]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(a, b))


def strided(kind: str) -> nn.Parameter:
    base = torch.randn(6, 8, generator=torch.Generator().manual_seed(4))
    return nn.Parameter({"transposed": base.t(), "slice": base[:, 2:5], "contiguous": base}[kind])
