"""Published sampling loops: when their passes become graphs, with a stand-in for a GPU."""

import copy
from collections.abc import Callable
from functools import wraps
from types import MethodType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from mdt_fast import MDTv2
from mdt_fast.diffusion import create_diffusion
from mdt_fast.diffusion.sampler import in_a_loop
from mdt_fast.errors import UserError
from mdt_fast.models import graphed
from mdt_fast.models.blocks import Block
from replayed import Captured, graphs_on_a_cpu
from small_models import made


@pytest.fixture(autouse=True)
def _on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs_on_a_cpu(monkeypatch)


@pytest.fixture
def model() -> nn.Module:
    return made("mdtv2", torch.float32, mask_ratio=0.3).eval()


Loop = Callable[[Any], Tensor]


def loops(steps: str = "12") -> dict[str, Loop]:
    """The published loops, over 4 rows that are guided or 2 that are not."""
    diffusion, y = create_diffusion(steps), torch.tensor([1, 2, 10, 10])
    guided: Any = {"model_kwargs": {"y": y, "cfg_scale": 3.8}, "device": "cpu"}
    plain: Any = {"model_kwargs": {"y": y[:2]}, "device": "cpu"}
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    return {
        "p": lambda model: diffusion.p_sample_loop(model.forward_with_cfg, (4, 4, 8, 8), **guided),
        "ddim": lambda model: diffusion.ddim_sample_loop(model, (2, 4, 8, 8), **plain),
        "ddim, by method": lambda model: diffusion.ddim_sample_loop(model.forward, (2, 4, 8, 8), **plain),
        "bound": lambda model: diffusion.calc_bpd_loop(model, x, model_kwargs={"y": y[:2]})["total_bpd"],
    }


def seeded(loop: Loop, model: Any) -> Tensor:
    torch.manual_seed(0)
    return loop(model)


@pytest.mark.parametrize("name", loops())
def test_published_loops_are_graphs(model: nn.Module, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = seeded(loops()[name], model)
    assert len(Captured.captures) == 1
    monkeypatch.setattr(graphed, "on_a_gpu", lambda tensor: False)
    assert torch.equal(ours, seeded(loops()[name], model))
    assert len(Captured.captures) == 1


def test_loops_of_few_steps_are_not(model: nn.Module) -> None:
    for loop in loops("9").values():
        loop(model)
    assert not Captured.captures
    loops("10")["p"](model)
    assert len(Captured.captures) == 1


def test_loops_that_wait_for_the_gpu_are_not(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    marks: list[Tensor] = []
    busy = SimpleNamespace(query=lambda: False)
    monkeypatch.setattr(graphed, "mark", lambda output: marks.append(output) or busy)
    loops()["p"](model)
    assert not Captured.captures
    assert len(marks) == graphed.PLAIN


class Own(nn.Module):
    def __init__(self, inside: nn.Module):
        super().__init__()
        self.inside = inside

    def forward(self, *args: Any) -> Any:
        return self.inside(*args)


class OwnForward(MDTv2):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


class OwnMethod(MDTv2):
    def forward_with_cfg(self, *args: Any, **kwargs: Any) -> Tensor:
        return super().forward_with_cfg(*args, **kwargs)


def _own_parts(model: Any) -> Any:
    model.y_embedder = Own(model.y_embedder)


def _own_forward(model: Any) -> Any:
    model.de_blocks[0].mlp.forward = model.de_blocks[0].mlp.forward


def _own_guidance(model: Any) -> Any:
    model.forward_with_cfg = MethodType(OwnMethod.__base__.forward_with_cfg, model)


def _own_name(model: Any) -> Any:
    model.forward_with_cfg = MethodType(lambda self, *args, **kwargs: self(*args, kwargs["y"]), model)


def _own_class(model: Any) -> Any:
    model.__class__ = OwnMethod


def _own_forward_alone(model: Any) -> Any:
    model.__class__ = OwnForward


def _own_condition(model: Any) -> Any:
    model.condition = model.condition


AROUND: dict[str, Callable[[Any], Any]] = {
    "a hook": lambda model: model.de_blocks[0].attn.register_forward_hook(lambda *args: None),
    "a hook before": lambda model: model.register_forward_pre_hook(lambda *args: None),
    "a compiled block": lambda model: model.de_blocks[0].compile(backend="eager"),
    "a module": _own_parts,
    "a forward": _own_forward,
    "another guidance": _own_guidance,
    "a function": _own_name,
    "a class": _own_class,
    "a class's forward": _own_forward_alone,
    "a condition": _own_condition,
}


@pytest.mark.parametrize("around", AROUND)
def test_loops_call_what_is_put_around_a_model(model: nn.Module, around: str) -> None:
    AROUND[around](model)
    loops()["p"](model)
    assert not Captured.captures


def test_loops_call_what_is_put_around_a_class(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, calls = Block.forward, []

    @wraps(plain)
    def counted(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(1)
        return plain(*args, **kwargs)

    monkeypatch.setattr(Block, "forward", counted)
    loops()["p"](model)
    assert not Captured.captures
    assert len(calls) == 12 * model.config.depth


@pytest.mark.parametrize("place", [0, 5])
def test_a_hook_that_comes_while_a_loop_runs_is_called(model: nn.Module, place: int) -> None:
    diffusion, y, seen = create_diffusion("12"), torch.tensor([1, 2]), []
    steps = diffusion.ddim_sample_loop_progressive(model, (2, 4, 8, 8), model_kwargs={"y": y}, device="cpu")
    for index, _ in enumerate(steps):
        if index == place:
            handle = model.de_blocks[0].register_forward_hook(lambda *args: seen.append(1))
        if index == place + 3:
            handle.remove()
    assert len(Captured.captures) == (place > graphed.PLAIN)
    assert len(seen) == 3


def test_another_layer_in_mid_loop_is_run(model: nn.Module) -> None:
    outputs = []
    for change in (True, False):
        torch.manual_seed(0)
        steps = create_diffusion("12").ddim_sample_loop_progressive(
            model, (2, 4, 8, 8), model_kwargs={"y": torch.tensor([1, 2])}, device="cpu"
        )
        before = model.final_layer.linear
        for index, step in enumerate(steps):
            last = step["sample"]
            if index == 5 and change:
                model.final_layer.linear = copy.deepcopy(before)
                model.final_layer.linear.weight.data.mul_(2)
        outputs.append(last)
        model.final_layer.linear = before
    assert not torch.equal(*outputs)


def test_what_a_loop_calls_hands_on_what_is_asked_of_it(model: nn.Module) -> None:
    called = in_a_loop(model, 12)
    assert next(called.parameters()) is next(model.parameters())
    assert called is not model
    bound = in_a_loop(model.forward_with_cfg, 12)
    assert bound.in_channels == 4

    def forward_with_cfg(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        return self.forward(*args, kwargs["y"])

    other = MethodType(forward_with_cfg, model)
    assert in_a_loop(other, 12) is other


def test_a_loop_within_a_capture_makes_none(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    loops()["p"](model)
    assert not Captured.captures


def test_loops_show_every_operation_to_who_counts(model: nn.Module) -> None:
    counts = []
    for steps in ("10", "20"):
        with FlopCounterMode(display=False) as counter:
            loops(steps)["p"](model)
        counts.append(counter.get_total_flops())
    assert counts[1] == 2 * counts[0] > 0
    seen: list[str] = []
    handle = nn.modules.module.register_module_forward_hook(lambda at, *_: seen.append(type(at).__name__))
    try:
        loops()["p"](model)
    finally:
        handle.remove()
    assert seen.count("MDTv2") == 12
    handle = nn.modules.module.register_module_forward_pre_hook(lambda at, *_: seen.append("before"))
    try:
        loops()["p"](model)
    finally:
        handle.remove()
    assert "before" in seen
    assert not Captured.captures


@pytest.mark.parametrize("error", [UserError("it does not\nfit"), torch.OutOfMemoryError("full")], ids=repr)
def test_a_loop_that_cannot_be_captured_goes_on(
    model: nn.Module, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Fails(Captured):
        def __call__(self, *args: Tensor) -> Tensor:
            raise error

    monkeypatch.setattr(graphed, "Graphed", Fails)
    with pytest.warns(UserWarning, match="^sampling without CUDA graphs, .*(not|full)$") as said:
        ours = seeded(loops()["p"], model)
    assert len(said) == 1
    monkeypatch.setattr(graphed, "on_a_gpu", lambda tensor: False)
    assert torch.equal(ours, seeded(loops()["p"], model))
