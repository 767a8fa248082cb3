"""A model's passes as graphs, with a stand-in on a CPU: what is captured, and when the model is called."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

from mdt_fast import GraphedModel, MDTv2
from mdt_fast.diffusion import create_diffusion
from mdt_fast.errors import UserError
from mdt_fast.models import graphed
from replayed import Captured, graphs_on_a_cpu
from small_models import made


@pytest.fixture(autouse=True)
def _on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs_on_a_cpu(monkeypatch)


@pytest.fixture
def model() -> nn.Module:
    return made("mdtv2", torch.float32, mask_ratio=0.3).eval()


def inputs(B: int = 4, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(B, 4, 8, 8, generator=generator)
    return x, torch.randint(1000, (B,), generator=generator), torch.randint(10, (B,), generator=generator)


@torch.no_grad()
def test_outputs_are_the_models_and_stay(model: nn.Module) -> None:
    quick, kept = GraphedModel(model), []
    for seed in range(3):
        x, t, y = inputs(seed=seed)
        kept.append((quick(x, t, y), model(x, t, y)))
        kept.append((quick.forward_with_cfg(x, t, y=y, cfg_scale=2.0), model.forward_with_cfg(x, t, y, 2.0)))
        each = torch.tensor([1.5, 2.0 + seed])
        kept.append((quick.forward_with_cfg(x, t, y, each), model.forward_with_cfg(x, t, y, each)))
    assert all(torch.equal(ours, expected) for ours, expected in kept)
    assert len(Captured.captures) == 3  # a pass; guided by one number; guided by one for each sample
    quick(*inputs(6))
    quick.forward_with_cfg(*inputs(), cfg_scale=3.0)
    quick.forward_with_cfg(*inputs(), cfg_scale=3.0, scale_pow=None)
    assert len(Captured.captures) == 6


def test_a_loop_of_the_published_kind(model: nn.Module) -> None:
    diffusion, quick = create_diffusion("5"), GraphedModel(model)
    pictures = []
    for each in (model, quick):
        torch.manual_seed(0)
        kwargs = {"y": torch.tensor([1, 2, 10, 10]), "cfg_scale": 3.8}
        pictures.append(
            diffusion.p_sample_loop(each.forward_with_cfg, (4, 4, 8, 8), model_kwargs=kwargs, device="cpu")
        )
    assert torch.equal(*pictures)
    assert len(Captured.captures) == 1
    assert quick.in_channels == 4
    assert quick.eval() is quick
    assert quick.train() is quick
    assert quick.float().to("cpu") is quick
    quick.mask_ratio = 0.5
    assert model.mask_ratio == 0.5
    assert model.training


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["forward", "forward_with_cfg", ""])
def test_a_loop_casts_and_finds_the_device_as_with_the_model(
    model: nn.Module, dtype: torch.dtype, name: str
) -> None:
    diffusion, kwargs, pictures = create_diffusion("5"), {"y": torch.tensor([1, 2, 10, 10])}, []
    model.to(dtype)
    for each in (model, GraphedModel(model)):
        torch.manual_seed(0)
        called = getattr(each, name) if name else each
        pictures.append(diffusion.ddim_sample_loop(called, (4, 4, 8, 8), model_kwargs=kwargs))
    assert torch.equal(*pictures)
    assert len(Captured.captures) == 1


def test_where_the_model_itself_is_called(model: nn.Module) -> None:
    quick, (x, t, y) = GraphedModel(model), inputs()
    assert quick(x, t, y).requires_grad
    with torch.no_grad():
        quick(x, t, y, enable_mask=True)
        quick(x, t, y, enable_mask=1)
        quick(x, t, y, mask_plan=model.draw_plan(4, x.device))
        quick(x, t, y, x_masked=x)
        quick.forward_with_cfg(x, t, y, torch.tensor(2.0))
        model.train()
        quick(x, t, y)
        model.eval()
        assert not Captured.captures
        with torch.autocast("cpu", torch.bfloat16):
            quick(x, t, y, enable_mask=False)
    assert len(Captured.captures) == 1


@torch.no_grad()
def test_weights_in_place_and_elsewhere(model: nn.Module) -> None:
    quick, given = GraphedModel(model), inputs()
    before = quick(*given)
    model.final_layer.linear.weight.mul_(2)
    assert torch.equal(quick(*given), model(*given))
    assert not torch.equal(before, model(*given))
    assert len(Captured.captures) == 1
    model.final_layer.linear.weight.data = model.final_layer.linear.weight.data + 1
    assert torch.equal(quick(*given), model(*given))
    assert len(Captured.captures) == 2
    assert not copy.deepcopy(quick).graphs


@torch.no_grad()
def test_one_graph_for_a_call_however_it_is_written(model: nn.Module) -> None:
    quick, (x, t, y) = GraphedModel(model), inputs()
    for ours in (quick(x, t, y), quick(x, y=y, t=t), quick.forward(y=y, t=t, x=x)):
        assert torch.equal(ours, model(x, t, y))
    assert len(Captured.captures) == 1
    quick.forward_with_cfg(x, t, y, 2)
    quick.forward_with_cfg(x, t, cfg_scale=2.0, y=y)
    assert len(Captured.captures) == 2
    with pytest.raises(TypeError):
        quick(x, t, y, no_such=1)
    with pytest.raises(TypeError):
        quick(x, t, y, t=t)


@torch.no_grad()
def test_other_parameters_and_buffers(model: nn.Module) -> None:
    quick, given = GraphedModel(model), inputs()
    model.x_embedder.register_buffer("something", torch.zeros(2))
    quick = GraphedModel(model)
    quick(*given)
    model.load_state_dict(model.state_dict(), assign=True)
    quick(*given)
    assert len(Captured.captures) == 2
    model.x_embedder.something = torch.zeros(2)
    quick(*given)
    assert len(Captured.captures) == 3


@torch.no_grad()
def test_a_forward_that_takes_whatever_comes_is_called() -> None:
    class Whatever(MDTv2):
        def forward(self, *args: Any, **kwargs: Any) -> Tensor:
            return super().forward(*args, **kwargs)

    model = Whatever(input_size=8, hidden_size=32, depth=2, num_heads=2, decode_layer=0).eval()
    x, t, y = inputs()
    assert torch.equal(GraphedModel(model)(x, t, y=y), model(x, t, y))
    assert not Captured.captures


def test_shards_are_called(model: nn.Module, tmp_path: Path) -> None:
    x, t, y = inputs()
    with torch.no_grad():
        expected = model(x, t, y), model.forward_with_cfg(x, t, y, 2.0)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1)
    try:
        fully_shard(model)
        register_fsdp_forward_method(model, "forward_with_cfg")
        quick = GraphedModel(model)
        with torch.no_grad():
            assert torch.equal(quick(x, t, y), expected[0])
            assert torch.equal(quick.forward_with_cfg(x, t, y, 2.0), expected[1])
    finally:
        dist.destroy_process_group()
    assert not Captured.captures


@torch.no_grad()
def test_not_without_end(model: nn.Module) -> None:
    quick, (x, t, y) = GraphedModel(model), inputs(2)
    for i in range(graphed.MOST + 5):
        scale = 1.0 + i / 8
        ours = quick.forward_with_cfg(x, t, y, scale)
        assert torch.equal(ours, model.forward_with_cfg(x, t, y, scale))
    assert len(Captured.captures) == graphed.MOST
    assert torch.equal(quick.forward_with_cfg(x, t, y, 1.0), model.forward_with_cfg(x, t, y, 1.0))
    quick = GraphedModel(model)
    for _ in range(graphed.MOST):
        with pytest.raises(UserError, match="x: got a batch of 1"):
            quick.forward_with_cfg(x[:1], t[:1], y[:1], 2.0)
    Captured.captures.clear()
    for B in range(1, graphed.MOST + 5):
        quick(*inputs(B))
    assert len(Captured.captures) == graphed.MOST


def test_refusals(model: nn.Module) -> None:
    with pytest.raises(UserError, match="model: got a Linear, expected this package's models"):
        GraphedModel(nn.Linear(2, 2))
    with pytest.raises(AttributeError, match="no_such_thing"):
        GraphedModel(model).no_such_thing  # noqa: B018
    with torch.no_grad(), pytest.raises(UserError, match="x: shape"):
        GraphedModel(model)(torch.zeros(2, 3, 8, 8), torch.zeros(2), torch.zeros(2, dtype=torch.int64))
