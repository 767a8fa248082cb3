"""The tests of ``transforms.py``, with the implementation for CPUs; and offsets no compiled call checks."""

import pytest
import torch

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
