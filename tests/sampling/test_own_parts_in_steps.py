"""What users put into a model or beside its parts is in the pictures, whichever switches are on."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mdt_fast import DiffusionConfig, MDTv2, SampleConfig, sample
from mdt_fast.config import SampleSwitches
from mdt_fast.models.blocks import Block, FinalLayer
from small_models import made
from tolerances import FLOAT64, relative_error

CONFIG = SampleConfig(steps=4, batch_size=3, cfg_scale=3.8, scale_pow=None)
LABELS = [3, 1, 3, 5]


def draw(model: nn.Module, switches: SampleSwitches) -> Tensor:
    return sample(model, DiffusionConfig(), LABELS, CONFIG, switches=switches)


def fast_and_plain(model: nn.Module) -> tuple[Tensor, Tensor]:
    return draw(model, SampleSwitches()), draw(model, SampleSwitches.none())


ATTACHED: dict[str, Callable[[Any], nn.Module]] = {
    "a last layer": lambda model: FinalLayer(32, 2, 8),
    "a copy": copy.deepcopy,
    "a wider model": lambda model: MDTv2(input_size=8, hidden_size=64, depth=2, num_heads=2, decode_layer=0),
    "a narrower block": lambda model: Block(16, 2, 4.0, None),
}


@pytest.mark.parametrize("attached", ATTACHED)
def test_what_is_attached_to_a_model_is_not_part_of_its_steps(attached: str) -> None:
    model = made("mdtv2").eval()
    before = draw(model, SampleSwitches())
    model.attached = ATTACHED[attached](model).double()
    fast, plain = fast_and_plain(model)
    assert torch.equal(fast, before)
    assert relative_error(plain, before) <= FLOAT64
