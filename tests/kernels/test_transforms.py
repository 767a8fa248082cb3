"""The tests of ``transforms.py``, with the implementation for CPUs; and offsets no compiled call checks."""

import pytest
import torch
from torch._subclasses import FakeTensorMode

from mdt_fast import kernels
from transforms import *  # noqa: F403


@pytest.mark.parametrize("wrong", [[0, 7, 5], [0, 2, 9], [1, 2, 5], [-3, 2, 4]], ids=str)
def test_offsets_that_nobody_checks_reach_no_other_memory(wrong: list[int]) -> None:
    """Compiled, in float64: the result may be meaningless, but each row has some sample's modulation."""

    def op(x: torch.Tensor, g: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        return kernels.ln_modulate(x, g, g, offsets=offsets)

    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    x, g = torch.randn(5, 8, dtype=torch.float64), torch.randn(2, 8, dtype=torch.float64)
    out = compiled(x, g, torch.tensor(wrong, dtype=torch.int32))
    normal = torch.nn.functional.layer_norm(x, (8,), eps=1e-6)
    each = torch.stack([normal * (1 + m) + m for m in g])
    assert ((out - each).abs().amax(-1).amin(0) < 1e-12).all()


def test_tensors_without_values_are_not_looked_at() -> None:
    """Fake ones, and those on the meta device."""

    def everything() -> list[torch.Tensor]:
        x, ids = torch.randn(2, 4, 8), torch.arange(4).expand(2, 4)
        q, table = torch.randn(2, 2, 4, 8), torch.randn(12, 2)
        offsets = torch.tensor([0, 4, 8], dtype=torch.int32)
        return [
            kernels.gather_tokens(x, ids, ids),
            kernels.merge_tokens(x, x[:, :2], ids),
            kernels.unmask_tokens(x[:, :2], x[:1, :1], x[:1], ids),
            kernels.rel_attention(q, q, q, table, grid_size=2, q_pos=ids, attention_backend="sdpa"),
            kernels.ln_modulate(x.flatten(0, 1), x[:, 0], x[:, 0], offsets=offsets),
            *kernels.mask_plan(torch.rand(2, 4), 2),
        ]  # fmt: skip

    shapes = [out.shape for out in everything()]
    with FakeTensorMode():
        assert [out.shape for out in everything()] == shapes
    with torch.device("meta"):
        assert [out.shape for out in everything()] == shapes
