"""Users' own loops on a GPU: CUDA graphs give what the same operations give one by one."""

import copy
import gc
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from mdt_fast import FusedAdan, GraphedModel, TrainingStep, create_diffusion
from mdt_fast.errors import UserError
from mdt_fast.models import graphed
from small_models import made

pytestmark = pytest.mark.gpu
SHAPE: dict[str, Any] = {"hidden_size": 64, "patch_size": 1}  # 64 tokens, for many possible lengths


def batch(seed: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(seed)
    return torch.randn(8, 4, 8, 8, device="cuda"), torch.randint(10, (8,), device="cuda")


@pytest.mark.parametrize("settings", [{}, {"accumulate": 2}, {"passes": "in_turn"}], ids=str)
def test_a_training_loop(settings: dict[str, Any]) -> None:
    model = made("mdtv2", torch.float32, mask_ratio=0.3, std=0.05, **SHAPE).cuda().train()
    plain = copy.deepcopy(model)
    losses = []
    for each, graphs in ((plain, False), (model, None)):
        step = TrainingStep(each, create_diffusion(), dtype="bfloat16", cuda_graphs=graphs, **settings)
        optimizer, found = FusedAdan(each.named_parameters(), lr=1e-3), []
        for i in range(12):
            x, y = batch(i)
            found.append(torch.stack([value.mean() for value in step(x, y).values()]))
            if (i + 1) % settings.get("accumulate", 1) == 0:
                optimizer.step()
                optimizer.zero_grad()
        losses.append(torch.stack(found))
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-2, atol=1e-3)
    assert len(step.made.graphed.captured) > 1
    for _ in range(2):  # nothing of an input's own autograd graph is kept
        x, y = batch(12)
        step(x.requires_grad_(), y)
    assert not any(
        x is not None and x.requires_grad for _, xs, _ in step.made.graphed.captured.values() for x in xs
    )
    norms = [p.grad.norm() for p in model.parameters() if p.grad is not None]
    del step  # the gradients outlive it
    gc.collect()
    torch.cuda.empty_cache()
    filled = [torch.full((2**20,), torch.nan, device="cuda") for _ in range(64)]
    assert torch.equal(
        torch.stack(norms), torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None])
    )
    del filled


def test_unequal_parts_of_an_update() -> None:
    """Labels of another dtype need another graph, captured in the middle of an update."""
    model = made("mdtv2", torch.float32, mask_ratio=0.3, std=0.05, **SHAPE).cuda().train()
    plain, norms = copy.deepcopy(model), []
    for each, graphs in ((plain, False), (model, None)):
        step = TrainingStep(each, create_diffusion(), accumulate=2, cuda_graphs=graphs)
        for i in range(2):
            x, y = batch(i)
            step(x, y if i == 0 else y.int())
        norms.append(torch.stack([p.grad.norm() for p in each.parameters() if p.grad is not None]))
    torch.testing.assert_close(norms[1], norms[0], rtol=1e-3, atol=1e-5)


def test_what_reads_numbers_on_the_host_is_said() -> None:
    class OnTheHost(torch.nn.Linear):
        def forward(self, y: Tensor, train: bool) -> Tensor:
            return super().forward(y) * y.sum().item()

    model = made("dit", torch.float32, **SHAPE)
    model.y_embedder = OnTheHost(8, 64)
    step = TrainingStep(model.cuda().train(), create_diffusion())
    stream, y = torch.cuda.current_stream(), torch.randn(8, 8, device="cuda")
    for _ in range(2):
        with pytest.raises(UserError, match="reads values on the host"):
            step(batch(0)[0], y)
        assert torch.cuda.current_stream() == stream
        torch.randn(8, device="cuda")  # draws from the default generator, which works on this stream again
    plain = TrainingStep(model, create_diffusion(), cuda_graphs=False)
    assert plain(batch(0)[0], y)["loss"].isfinite().all()


@pytest.mark.filterwarnings("error:sampling without CUDA graphs")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_published_loops(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """With graphs (one launch a step), which the loops use by themselves, against launches one by one."""
    model = made("mdtv2", torch.float32, mask_ratio=0.3, std=0.05, **SHAPE).cuda().eval()
    diffusion, y = create_diffusion("12"), torch.tensor([1, 2, 10, 10], device="cuda")
    replayed: list[int] = []
    replay = torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda self: replayed.append(1) or replay(self))
    # On a GPU that others use too, the loop may not be waiting for the host.
    done = SimpleNamespace(query=lambda: True)
    monkeypatch.setattr(graphed, "mark", lambda output: done)
    for loop, called, kwargs in (
        (diffusion.p_sample_loop, model.forward_with_cfg, {"y": y, "cfg_scale": 3.8}),
        (diffusion.ddim_sample_loop, model, {"y": y}),
    ):
        pictures, left = [], []
        for long in (100, graphed.LONG):
            monkeypatch.setattr(graphed, "LONG", long)
            torch.manual_seed(0)
            with torch.autocast("cuda", dtype, enabled=dtype != torch.float32), torch.inference_mode():
                pictures.append(loop(called, (4, 4, 8, 8), model_kwargs=kwargs, device="cuda"))
            gc.collect()
            left.append(torch.cuda.memory_allocated())
        torch.testing.assert_close(pictures[1], pictures[0], rtol=1e-3, atol=1e-3)
        assert left[1] - left[0] < 2**26  # but for a library's workspace, a loop's memory is freed with it
    assert len(replayed) == 2 * (12 - graphed.PLAIN)


def test_the_mark_behind_a_pass_is_seen_once_the_gpu_is_done() -> None:
    mark = graphed.mark(torch.ones(2**20, device="cuda").cumsum(0))
    torch.cuda.synchronize()
    assert mark.query()


def test_a_sampling_loop() -> None:
    model = made("mdtv2", torch.float32, mask_ratio=0.3, std=0.05, **SHAPE).cuda().eval()
    diffusion, quick = create_diffusion("10"), GraphedModel(model)
    y = torch.tensor([1, 2, 10, 10], device="cuda")
    for scale in (2.0, torch.tensor([2.0, 3.0], device="cuda")):
        pictures = []
        for each in (model, quick):
            torch.manual_seed(0)
            with torch.autocast("cuda", torch.bfloat16):
                picture = diffusion.p_sample_loop(
                    lambda x, t, each=each, **kwargs: each.forward_with_cfg(x, t, **kwargs).float(),
                    (4, 4, 8, 8), model_kwargs={"y": y, "cfg_scale": scale}, device="cuda",
                )  # fmt: skip
            pictures.append(picture)
        torch.testing.assert_close(pictures[1], pictures[0], rtol=1e-3, atol=1e-3)
    assert len(quick.graphs) == 2
    x, t = torch.randn(4, 4, 8, 8, device="cuda"), torch.arange(4, device="cuda")
    with torch.inference_mode():
        kept = quick(x, t, y)
    with torch.no_grad():
        torch.testing.assert_close(quick(x, t, y), model(x, t, y), rtol=1e-4, atol=1e-4)
        model.final_layer.linear.weight.mul_(2)
        torch.testing.assert_close(quick(x, t, y), model(x, t, y), rtol=1e-4, atol=1e-4)
        assert not torch.equal(quick(x, t, y), kept)
