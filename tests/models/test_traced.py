"""``torch.jit.trace`` sees plain PyTorch, so that a trace can be saved and run without this package."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mdt_fast import MaskPlan
from small_models import made
from tolerances import FLOAT32, relative_error

pytestmark = pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")


class Masked(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, t: Tensor, y: Tensor, ids_keep: Tensor) -> Tensor:
        return self.model(x, t, y, mask_plan=MaskPlan.from_keep(ids_keep, 16))


def inputs(batch: int) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(batch)
    return torch.randn(batch, 4, 8, 8), torch.arange(batch) * 100, torch.arange(batch)


@pytest.mark.parametrize("family", ["mdtv2", "mdt", "dit"])
@torch.no_grad()
def test_a_trace_is_plain_and_can_be_saved(family: str, tmp_path: Path) -> None:
    model: Any = made(family).float().eval()
    torch.jit.trace(model, inputs(4)).save(tmp_path / "model.pt")
    loaded = torch.jit.load(tmp_path / "model.pt")
    assert "mdt_fast::" not in str(loaded.inlined_graph)
    for batch in (4, 2):
        assert relative_error(loaded(*inputs(batch)), model(*inputs(batch))) <= FLOAT32


@torch.no_grad()
def test_a_masked_pass(tmp_path: Path) -> None:
    model: Any = made("mdtv2").float().eval()
    plan = MaskPlan.from_noise(torch.rand(4, 16), 9)
    torch.jit.trace(Masked(model), (*inputs(4), plan.ids_keep)).save(tmp_path / "model.pt")
    loaded = torch.jit.load(tmp_path / "model.pt")
    other = MaskPlan.from_noise(torch.rand(2, 16), 6)
    expected = model(*inputs(2), mask_plan=other)
    assert relative_error(loaded(*inputs(2), other.ids_keep), expected) <= FLOAT32
