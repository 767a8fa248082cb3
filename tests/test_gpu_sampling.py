"""Sampling on a GPU: a step as a CUDA graph draws the same pictures as without graphs and as the CPU."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mdt_fast.config import DiffusionConfig, Family, SampleConfig, SampleSwitches
from mdt_fast.sampling import Sampler, sampling_diffusion
from small_models import made
from tolerances import FLOAT32, relative_error

pytestmark = pytest.mark.gpu
CONFIG = SampleConfig(steps=12, cfg_scale=3.8, sampler="ddpm")
LABELS = [3, 1, 3, 5]
SHAPE: dict[str, Any] = {"input_size": 16, "hidden_size": 128, "std": 0.05}


def sampler(model: nn.Module, config: SampleConfig, switches: SampleSwitches) -> Sampler:
    return Sampler(
        model, sampling_diffusion(model.config, DiffusionConfig(), config), config, switches=switches
    )


@pytest.mark.parametrize("name", ["ddpm", "ddim", "dpm++", "unipc"])
@pytest.mark.parametrize("family", ["mdtv2", "mdt", "dit"])
def test_a_graph_gives_the_same_pictures(family: Family, name: Any) -> None:
    """Steps with and without guidance, batches of other classes and sizes, and each switch off in turn."""
    if name in ("dpm++", "unipc"):
        pytest.importorskip("diffusers")
    model = made(family, torch.float32, **SHAPE).cuda()
    config = replace(CONFIG, sampler=name, cfg_interval=(100.0, 700.0))
    for switches in (
        SampleSwitches(),
        SampleSwitches(fused_step=False),
        SampleSwitches(batched_modulations=False),
        SampleSwitches(shared_embedding=False),
    ):
        graphed = sampler(model, config, switches)
        eager = sampler(model, config, replace(switches, cuda_graph=False))
        for labels in (LABELS, [7, 8, 9, 0], [2, 2]):
            assert relative_error(graphed(labels), eager(labels)) <= FLOAT32
        assert len(graphed.model.graphs.captured) == 4  # two sizes, with guidance and without


def test_what_a_batch_gave_stays_when_the_next_is_drawn() -> None:
    model = made("mdtv2", torch.float32, **SHAPE).cuda()
    draw = sampler(model, CONFIG, SampleSwitches())
    first = draw(LABELS)
    kept = first.clone()
    draw([7, 8, 9, 0])
    assert torch.equal(first, kept)


def test_no_waiting_for_the_device() -> None:
    """Once captured, a whole batch is queued without a synchronisation."""
    model = made("mdtv2", torch.float32, **SHAPE).cuda()
    draw = sampler(model, CONFIG, SampleSwitches())
    draw(LABELS)
    draw.model.begin(LABELS)
    x = torch.randn(4, 4, 16, 16, device="cuda")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.no_grad():
            for index in range(CONFIG.steps - 1, -1, -1):
                x = draw.model.step(x, index, x)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("family", ["mdtv2", "dit"])
def test_the_same_pictures_as_on_the_cpu(family: Family) -> None:
    """The noise is the same; twelve steps amplify the rounding differences of products."""
    model = made(family, torch.float32, **SHAPE)
    on_cpu: Tensor = sampler(model, CONFIG, SampleSwitches())(LABELS)
    on_gpu = sampler(model.cuda(), CONFIG, SampleSwitches())(LABELS)
    assert relative_error(on_gpu.cpu(), on_cpu) <= 1e-3


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_types_in_a_graph(dtype: Any) -> None:
    model = made("mdtv2", torch.float32, **SHAPE).cuda()
    exact = sampler(model, CONFIG, SampleSwitches())(LABELS)
    draw = sampler(model, replace(CONFIG, dtype=dtype), SampleSwitches())
    got = draw(LABELS)
    assert got.dtype == torch.float32
    assert 0 < relative_error(got, exact) < 0.05
    assert torch.equal(draw(LABELS), got)
    with torch.no_grad():
        model.en_inblocks[0].mlp.fc1.weight.mul_(2)
    changed = draw(LABELS)
    assert not torch.equal(changed, got)
    assert torch.equal(changed, sampler(model, replace(CONFIG, dtype=dtype), SampleSwitches())(LABELS))
