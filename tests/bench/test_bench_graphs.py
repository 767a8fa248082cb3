"""The training step with graphed passes, by a stand-in for CUDA's: the numbers of the plain one."""

from dataclasses import replace

import pytest
import torch

import providers
import steps
from inputs import load
from mdt_fast.presets import PRESETS
from mdt_fast.training import passes
from replayed import Replayed


@pytest.mark.parametrize("family", ["mdtv2", "dit"])
def test_a_graphed_step_is_the_plain_one(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes, "Graphed", Replayed)
    small = {"hidden_size": 32, "depth": 2, "num_heads": 2, "decode_layer": 0, "family": family}
    if family == "dit":
        small["mask_ratio"] = None
    config = replace(PRESETS["digits"].model, **small)
    device = torch.device("cpu")
    case = steps.Case("small", config, "train", 4, torch.float32, device)
    inputs = load("digits", config, 4)
    lengths = (11, 8, 11) if family != "dit" else (None,)
    found = []
    for name in ("fast", "fast-graphs"):
        modules = providers.Modules(config, device, None)
        module = modules.get("fast")
        provider = providers.Provider(
            name, module, module, module.forward_with_cfg, getattr(module, "training_step_outputs", None)
        )
        kind = steps.GraphedTrainStep if provider.graphed else steps.TrainStep
        step = kind(case, provider, inputs, lengths, None)
        outcome = step.outcome()
        for index in range(4):
            step(index)
        found.append([*outcome, *(p.detach().clone() for p in module.parameters())])
    for ours, plain in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-6)


def test_without_a_gpu_it_is_left_out() -> None:
    modules = providers.Modules(PRESETS["digits"].model, torch.device("cpu"), None)
    with pytest.raises(providers.Skip, match="CUDA graphs need a GPU"):
        providers.make("fast-graphs", modules)
