"""Saving and loading models of derived classes, and models whose weights have several dtypes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mdt_fast import MDTv2

SHAPE: dict[str, Any] = {
    "input_size": 8, "hidden_size": 16, "depth": 4, "num_heads": 2, "num_classes": 10, "mask_ratio": 0.3,
    "decode_layer": 2,
}  # fmt: skip
INPUTS = torch.randn(2, 4, 8, 8), torch.tensor([3, 900]), torch.tensor([1, 10])


class Shifted(MDTv2):
    """Has a tensor and a buffer that are not in the ``state_dict``."""

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        self.register_buffer("phase", torch.linspace(0, 1, 8), persistent=False)
        self.factor = torch.tensor(2.0)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return super().forward(x / self.factor + self.phase.to(x.dtype), *args, **kwargs)


def randomised(model: MDTv2) -> MDTv2:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1)
    return model.eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_derived_class_makes_itself_is_kept(dtype: torch.dtype, tmp_path: Path) -> None:
    model = randomised(Shifted(**SHAPE)).to(dtype)
    model.save_pretrained(tmp_path)
    loaded = Shifted.from_pretrained(tmp_path)
    assert loaded.phase.device == loaded.factor.device == torch.device("cpu")
    assert loaded.phase.dtype == dtype
    x, t, y = INPUTS
    with torch.no_grad():
        assert torch.equal(loaded(x.to(dtype), t, y), model(x.to(dtype), t, y))


def test_each_weight_keeps_its_dtype(tmp_path: Path) -> None:
    model = randomised(MDTv2(**SHAPE)).bfloat16()
    model.final_layer.float()
    model.save_pretrained(tmp_path)
    loaded = MDTv2.from_pretrained(tmp_path).state_dict()
    assert {key: value.dtype for key, value in loaded.items()} == {
        key: value.dtype for key, value in model.state_dict().items()
    }
    chosen = MDTv2.from_pretrained(tmp_path, dtype="float16")
    assert {parameter.dtype for parameter in chosen.parameters()} == {torch.float16}
