"""Checks a kernel against plain PyTorch: outputs, gradients of a projection, the same bits twice."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from tolerances import FLOAT32, HALF_FACTOR, relative_error

Op = Callable[..., Any]


@contextmanager
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Memory that a kernel forgets to write shows up as NaN."""
    with monkeypatch.context() as patch:
        for name in ("empty_like", "empty"):
            plain = getattr(torch, name)
            patch.setattr(torch, name, lambda *a, _plain=plain, **k: _poison(_plain(*a, **k)))
        plain_new = Tensor.new_empty
        patch.setattr(Tensor, "new_empty", lambda self, *a, **k: _poison(plain_new(self, *a, **k)))
        yield


def _poison(x: Tensor) -> Tensor:
    with torch.no_grad():
        return x.fill_(torch.nan) if x.is_floating_point() else x


def run(op: Op, args: list[Tensor], seed: int = 1) -> list[Tensor]:
    """Outputs, then the gradients of a random projection of them (the same for every dtype)."""
    leaves = [a.detach().clone().requires_grad_() for a in args]
    outputs = op(*leaves)
    outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
    generator = torch.Generator().manual_seed(seed)
    loss = sum((o * torch.randn(o.shape, generator=generator).to(o.device, o.dtype)).sum() for o in outputs)
    # Zeros for arguments that an empty set of tokens leaves without a gradient.
    return [*outputs, *torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)]


def compare(op: Op, plain: Op, args: list[Tensor], dtype: torch.dtype, twice: bool = True) -> None:
    """``op`` against ``plain`` in float64; half types within twice the error of ``plain`` in the same type.
    ``twice``: two runs must also give the same bits."""
    args = [a.to(dtype) for a in args]
    ours, again = run(op, args), run(op, args)
    exact, same_dtype = run(plain, [a.double() for a in args]), run(plain, args)
    for i, (a, b, e, p) in enumerate(zip(ours, again, exact, same_dtype, strict=True)):
        assert a.dtype == dtype
        assert not twice or torch.equal(a, b), f"result {i}: two runs differ"
        allowed = FLOAT32
        if dtype != torch.float32:
            allowed = HALF_FACTOR * max(relative_error(p, e), torch.finfo(dtype).eps)
        assert relative_error(a, e) <= allowed, f"result {i}"


def same(op: Op, other: Op, args: list[Tensor]) -> None:
    """Both give the same bits, outputs and gradients."""
    for i, (a, b) in enumerate(zip(run(op, args), run(other, args), strict=True)):
        assert torch.equal(a, b), f"result {i}"
