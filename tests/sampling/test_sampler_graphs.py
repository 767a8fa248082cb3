"""A sampler's CUDA graphs: how long they last, when they are captured anew; with stand-ins on a CPU."""

import copy
import gc
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mdt_fast.config import DiffusionConfig, SampleConfig, Switches
from mdt_fast.sampling import Sampler, guided, sampling_diffusion
from small_models import made

CONFIG = SampleConfig(steps=5, batch_size=3, cfg_scale=3.8)
LABELS = [3, 1, 3, 5]


@pytest.fixture
def graphed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Sampler]:
    """A sampler that replays on a CPU, where a replay is a call."""

    class Graph:
        def __init__(self, function: Any, device: torch.device):
            self.function = function

        def __call__(self, *args: Any) -> Tensor:
            return self.function(*args)

    monkeypatch.setattr(guided, "Graphed", Graph)

    def build(model: nn.Module, config: SampleConfig) -> Sampler:
        sampler = Sampler(model, sampling_diffusion(model.config, DiffusionConfig(), config), config)
        sampler.model.graphed = True
        return sampler

    return build


def test_graphs_end_with_what_made_them(graphed: Callable[..., Sampler]) -> None:
    sampler = graphed(made("dit", torch.float32).eval(), CONFIG)
    sampler(LABELS)
    graphs = weakref.ref(sampler.model.graphs)
    gc.disable()
    try:
        del sampler
        assert graphs() is None
    finally:
        gc.enable()


def test_a_copy_has_graphs_of_its_own(graphed: Callable[..., Sampler]) -> None:
    sampler = graphed(made("dit", torch.float32).eval(), CONFIG)
    before = sampler(LABELS)
    copied = copy.deepcopy(sampler)
    assert copied.model.graphs is None  # a captured one cannot be copied
    with torch.no_grad():
        copied.model.model.blocks[0].mlp.fc1.weight.mul_(2)
    assert not torch.equal(copied(LABELS), before)
    assert torch.equal(sampler(LABELS), before)


def test_graphs_are_captured_anew_for_other_memory(graphed: Callable[..., Sampler]) -> None:
    """And only then: new values are written to the old addresses."""
    model, config = made("dit", torch.float32).eval(), replace(CONFIG, dtype="bfloat16")
    seen = graphed(model, config).model
    seen.begin(LABELS)
    first, addresses = seen.graphs, [cast[0].data_ptr() for cast in seen.casts.cast]
    block = model.blocks[0]
    block.attn.proj.weight = nn.Parameter(2 * block.attn.proj.weight)
    seen.begin(LABELS)
    assert seen.graphs is first
    assert addresses == [cast[0].data_ptr() for cast in seen.casts.cast]
    other = copy.deepcopy(block.attn.proj)
    other.bias = block.attn.proj.bias  # what is not cast has not moved
    block.attn.proj = other
    seen.begin(LABELS)
    assert seen.graphs is not first


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_that_came_in_the_place_of_others(dtype: str, graphed: Callable[..., Sampler]) -> None:
    model = made("mdtv2", torch.float32).eval()
    seen = graphed(model, replace(CONFIG, dtype=dtype)).model
    seen.begin(LABELS)
    first = seen.graphs
    model.load_state_dict({name: weight + 0 for name, weight in model.state_dict().items()})
    seen.begin(LABELS)
    assert seen.graphs is first
    model.load_state_dict({name: weight + 0 for name, weight in model.state_dict().items()}, assign=True)
    seen.begin(LABELS)
    assert seen.graphs is not first


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.blocks[0].register_forward_hook(lambda block, given, out: 2 * out),
        lambda model: model.set_switches(Switches(fused_adaln=False)),
        lambda model: model.set_attention_backend("sdpa"),
        lambda model: setattr(model.blocks[0].mlp, "forward", model.blocks[1].mlp.forward),
    ],
    ids=["hook", "switches", "backend", "forward"],
)
def test_graphs_are_captured_anew_for_what_is_run_otherwise(
    change: Callable[[Any], Any], graphed: Callable[..., Sampler]
) -> None:
    model = made("dit", torch.float32).eval()
    seen = graphed(model, CONFIG).model
    seen.begin(LABELS)
    first = seen.graphs
    seen.begin(LABELS)
    assert seen.graphs is first
    change(model)
    seen.begin(LABELS)
    assert seen.graphs is not first
