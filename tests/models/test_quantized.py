"""Models with quantised linear layers: torchao quantises their weights, torch replaces the layers."""

import copy
import importlib.util
import warnings

import pytest
import torch
from torch import nn

from mdt_fast import MDT, DiT, MDTv2, SampleConfig, create_diffusion, reference, sample
from mdt_fast.sampling.guided import _addresses
from tolerances import relative_error

SHAPE = {
    "input_size": 8, "patch_size": 2, "in_channels": 4, "hidden_size": 64, "depth": 4, "num_heads": 2,
    "num_classes": 10,
}  # fmt: skip
FAMILIES = {"mdtv2": MDTv2, "mdt": MDT, "dit": DiT}
INPUTS = torch.randn(2, 4, 8, 8), torch.tensor([3, 700]), torch.tensor([0, 2])


def made(family: str) -> nn.Module:
    torch.manual_seed(0)
    model = FAMILIES[family](**SHAPE, **({} if family == "dit" else {"decode_layer": 2}))
    for parameter in model.parameters():
        if not parameter.any():
            parameter.data.normal_(std=0.1)
    return model.eval()


@pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="needs torchao")
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("config", ["Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"])
def test_int8_by_torchao(family: str, config: str) -> None:
    from torchao import quantization

    model = made(family)
    plain = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantization.quantize_(model, getattr(quantization, config)())
    with torch.no_grad():
        assert 0 < relative_error(model(*INPUTS), plain(*INPUTS)) < 0.1
    pictures = sample(model, create_diffusion("3"), [1, 2], SampleConfig(steps=3, cfg_scale=2.0))
    assert pictures.isfinite().all()
    (block, *_), addresses = model.every_block(), lambda: [*_addresses(model.parameters())]
    before = addresses()
    block.attn.proj.weight = copy.deepcopy(block.attn.proj.weight)
    assert addresses() != before
    assert len(addresses()) > len(list(model.parameters()))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("implementation", ["fast", "reference"])
@pytest.mark.parametrize("family", FAMILIES)
def test_dynamically_by_torch(family: str, implementation: str) -> None:
    model = made(family)
    if implementation == "reference":
        plain = getattr(reference, type(model).__name__)(
            **SHAPE, **({} if family == "dit" else {"decode_layer": 2})
        )
        plain.load_state_dict(model.state_dict())
        model = plain.eval()
    quantized = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
    with torch.no_grad():
        assert 0 < relative_error(quantized(*INPUTS), model(*INPUTS)) < 0.1
