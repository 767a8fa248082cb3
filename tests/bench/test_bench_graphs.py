"""The training step's other forms, with a stand-in for CUDA's graphs: the numbers of the plain one."""

from dataclasses import replace

import pytest
import torch

import providers
import steps
from inputs import load
from mdt_fast.presets import PRESETS
from mdt_fast.training import passes
from measure import peak_bytes
from replayed import Replayed
from rows import RowFile
from session import Result, Session


@pytest.mark.parametrize("family", ["mdtv2", "dit"])
def test_every_form_of_a_step_is_the_plain_one(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
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
    for name in ("fast", "fast-graphs", "fast-in-turn", "fast-in-turn-graphs"):
        modules = providers.Modules(config, device, None)
        module = modules.get("fast")
        provider = replace(providers.make(name.removesuffix("-graphs"), modules), name=name)
        assert (provider.both is None) == (provider.in_turn or family == "dit")
        kind = steps.GraphedTrainStep if provider.graphed else steps.TrainStep
        step = kind(case, provider, inputs, lengths, None)
        outcome = step.outcome()
        for index in range(4):
            step(index)
        found.append([*outcome, *(p.detach().clone() for p in module.parameters())])
    for other in found[1:]:
        for ours, plain in zip(other, found[0], strict=True):
            torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-6)


def test_memory_is_the_same_whoever_ran_before() -> None:
    """Gradients left behind by another measurement are no memory that a step gives back."""
    config, device = PRESETS["digits"].model, torch.device("cpu")
    case = steps.Case("digits", config, "train", 2, torch.float32, device)
    provider = providers.make("fast", providers.Modules(config, device, None))
    step = steps.TrainStep(case, provider, load("digits", config, 2), (11,), None)
    step(0)
    session, found = Session(RowFile(None, {}), print), [Result("fast"), Result("fast")]
    for one in found:
        session.memory(case, step, one)
    whole = found[0].peak_bytes
    assert whole is not None
    assert whole == found[1].peak_bytes
    assert peak_bytes(step, device) < whole - step.own_bytes()  # what it looks like otherwise


def test_without_a_gpu_it_is_left_out() -> None:
    modules = providers.Modules(PRESETS["digits"].model, torch.device("cpu"), None)
    with pytest.raises(providers.Skip, match="CUDA graphs need a GPU"):
        providers.make("fast-graphs", modules)
