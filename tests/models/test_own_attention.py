"""Attention and MLPs map tokens to tokens, whatever is around them, and bring their weights when called."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.utils.parametrize import register_parametrization

from mdt_fast import MDT, DiT, MDTv2, Switches, reference
from mdt_fast.errors import UserError
from mdt_fast.models.attention import Attention
from tolerances import FLOAT64, relative_error

FAMILIES = (MDTv2, MDT, DiT)
X, T, Y = torch.randn(3, 4, 8, 8, dtype=torch.float64), torch.tensor([1, 500, 900]), torch.tensor([1, 2, 3])


def pair(cls: Any, **changes: Any) -> tuple[Any, Any]:
    """A model and its reference, with the same random weights."""
    torch.manual_seed(0)
    options: dict[str, Any] = {
        "input_size": 8,
        "hidden_size": 32,
        "depth": 4,
        "num_heads": 4,
        "num_classes": 10,
    }
    options |= changes if cls is DiT else {"decode_layer": 2, "mask_ratio": 0.3} | changes
    ours, theirs = cls(**options).double().eval(), getattr(reference, cls.__name__)(**options).double().eval()
    for parameter in ours.parameters():
        parameter.data.normal_(std=0.15)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def all_blocks(model: Any) -> list[Any]:
    lists = (getattr(model, name, ()) for name in ("blocks", "en_inblocks", "en_outblocks", "de_blocks"))
    return [block for blocks in (*lists, getattr(model, "sideblocks", ())) for block in blocks]


def passes(model: Any) -> list[Tensor]:
    """A pass over all tokens and, if there are masks, one over those that a mask keeps."""
    found = [model(X, T, Y)]
    if not isinstance(model, DiT | reference.DiT):
        torch.manual_seed(2)
        found.append(model(X, T, Y, enable_mask=True))
    return found


def gradients(model: Any) -> dict[str, Tensor]:
    model.zero_grad()
    sum(output.square().mean() for output in passes(model)).backward()
    named = ((name.replace("qkv.", "QKV."), p.grad) for name, p in model.named_parameters())
    return {name: grad for name, grad in named if grad is not None and not name.endswith("QKV.bias")}


class Beside(nn.Module):
    """A module with an adapter beside it, which takes the same tokens."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module, self.down, self.up = module, nn.Linear(32, 2), nn.Linear(2, 32)
        generator = torch.Generator().manual_seed(5)
        for parameter in [*self.down.parameters(), *self.up.parameters()]:
            parameter.data.normal_(std=0.3, generator=generator)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.module(x, *args, **kwargs) + self.up(self.down(x))


class Alone(Beside):
    """Takes nothing but tokens."""

    def forward(self, x: Tensor, *args: Any) -> Tensor:
        return self.module(x) + self.up(self.down(x))


class Sequence(nn.Sequential):
    """Takes the reference's other arguments."""

    def forward(self, x: Tensor, *args: Any) -> Tensor:
        result: Tensor = self[0](x, *args)
        return result


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "Sequential": nn.Sequential,
    "an adapter beside it": lambda module: Beside(module).double(),
    "checkpoint_wrapper": checkpoint_wrapper,
    "torch.compile": lambda module: torch.compile(module, backend="eager"),
}


@pytest.mark.parametrize("ratio", [1.0, 4.0])
@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("name", ["mlp", "attn"])
@pytest.mark.parametrize("cls", FAMILIES)
def test_a_wrapped_part_computes_the_same(cls: Any, name: str, wrapper: str, ratio: float) -> None:
    torch._dynamo.reset()
    ours, theirs = pair(cls, mlp_ratio=ratio)
    for model in (ours, theirs):
        for block in all_blocks(model):
            wrap = WRAPPERS[wrapper]
            if wrapper == "Sequential" and model is theirs:
                wrap = Sequence
            setattr(block, name, wrap(getattr(block, name)))
    found, expected = gradients(ours), gradients(theirs)
    for output, wanted in zip(passes(ours), passes(theirs), strict=True):
        assert relative_error(output, wanted) < FLOAT64
    values = (torch.cat([g.flatten() for _, g in sorted(each.items())]) for each in (found, expected))
    assert relative_error(*values) < 10 * FLOAT64


def test_an_adapter_that_takes_tokens_alone_in_every_mode() -> None:
    """Packed or not, recomputed or not: attention inside knows which tokens a mask keeps."""
    ours, _ = pair(MDTv2)
    for block in ours.every_block():
        block.attn, block.mlp = Alone(block.attn).double(), Alone(block.mlp).double()
    plan, outputs = ours.draw_plan(3, X.device), []
    ours.set_switches(Switches.none())
    expected = ours.training_step_outputs(X, X, T, Y, Y, plan)
    for mode in ("none", "full"):
        for switches in (Switches(), Switches(packed=False)):
            ours.set_checkpointing(mode)
            ours.set_switches(switches)
            outputs = ours.training_step_outputs(X, X, T, Y, Y, plan)
            assert max(map(relative_error, outputs, expected)) < FLOAT64
            ours.zero_grad()
            outputs[1].square().mean().backward()


def test_parts_called_by_hand() -> None:
    ours, theirs = pair(MDTv2)
    x = torch.randn(3, 16, 32).double()
    ids = torch.stack([torch.randperm(16)[:5] for _ in range(3)])
    for block, other in zip(all_blocks(ours), all_blocks(theirs), strict=True):
        assert relative_error(block.mlp(x), other.mlp(x)) < FLOAT64
        assert relative_error(block.attn(x), other.attn(x)) < FLOAT64
        assert relative_error(block.attn(x[:, :5], ids), other.attn(x[:, :5], ids)) < FLOAT64
        for switches in (Switches.none(), Switches()):
            ours.set_switches(switches)
            assert relative_error(block.mlp(x), other.mlp(x)) < FLOAT64


def test_attention_of_another_kind() -> None:
    class Mean(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mean(1, keepdim=True).expand_as(x)

    ours, _ = pair(MDTv2)
    ours.de_blocks[0].attn = Mean()  # the decoder has whole grids
    assert all(output.isfinite().all() for output in passes(ours))
    ours.en_inblocks[0].attn = Mean()
    assert ours(X, T, Y).isfinite().all()
    with pytest.raises(UserError, match=r"^attn: got a Mean, expected an Attention or a module around one"):
        ours(X, T, Y, enable_mask=True)


def merged(module: nn.Module, *_: Any) -> None:
    for layer in module.children():
        if isinstance(layer, nn.Linear):
            layer.weight.data.mul_(1.5)


def unmerged(module: nn.Module, *_: Any) -> None:
    for layer in module.children():
        if isinstance(layer, nn.Linear):
            layer.weight.data.div_(1.5)


@pytest.mark.parametrize("name", ["attn", "mlp"])
@pytest.mark.parametrize("cls", FAMILIES)
def test_weights_that_are_merged_for_a_part(cls: Any, name: str) -> None:
    ours, theirs = pair(cls)
    before = ours(X, T, Y)
    for model in (ours, theirs):
        for block in all_blocks(model):
            getattr(block, name).register_forward_pre_hook(merged)
            getattr(block, name).register_forward_hook(unmerged)
    with torch.no_grad():
        for output, wanted in zip(passes(ours), passes(theirs), strict=True):
            assert relative_error(output, wanted) < FLOAT64
        assert relative_error(ours(X, T, Y), before) > 1e-3


@pytest.mark.parametrize("name", ["attn", "mlp"])
def test_parts_that_are_sharded_by_themselves(name: str, tmp_path: Path) -> None:
    ours, theirs = pair(MDTv2)
    expected = gradients(theirs)
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        for block in all_blocks(ours):
            fully_shard(getattr(block, name), mesh=mesh)
        fully_shard(ours, mesh=mesh)
        found = {name: grad.full_tensor() for name, grad in gradients(ours).items()}
    finally:
        dist.destroy_process_group()
    values = (torch.cat([g.flatten() for _, g in sorted(each.items())]) for each in (found, expected))
    assert relative_error(*values) < 10 * FLOAT64


@pytest.mark.parametrize("cls", FAMILIES)
def test_parts_that_are_compiled_into_one_graph_with_adapters(cls: Any) -> None:
    torch._dynamo.reset()
    ours, _ = pair(cls)
    for block in ours.every_block():
        block.attn, block.mlp = Beside(block.attn).double(), nn.Sequential(block.mlp)
    if cls is not DiT:
        plan = ours.draw_plan(3, X.device)
        given = {"mask_plan": plan}
    expected = ours(X, T, Y, **({} if cls is DiT else given))
    compiled = torch.compile(copy.deepcopy(ours), backend="eager", fullgraph=True)
    assert relative_error(compiled(X, T, Y, **({} if cls is DiT else given)), expected) < FLOAT64


def test_a_parametrized_layer_within_a_hooked_part() -> None:
    class Doubling(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    ours, theirs = pair(DiT)
    for model in (ours, theirs):
        model.blocks[0].attn.register_forward_hook(lambda module, given, out: out + 1)
        register_parametrization(model.blocks[0].attn.qkv, "weight", Doubling())
    assert relative_error(ours(X, T, Y), theirs(X, T, Y)) < FLOAT64


def test_a_part_compiled_by_itself_runs_compiled() -> None:
    model, _ = pair(DiT)
    seen: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        seen.append(len(inputs))
        return graph.forward

    with torch.no_grad():
        expected = model(X, T, Y)
        model.blocks[0].attn.compile(backend=backend)
        model.blocks[0].mlp.compile(backend=backend)
        torch.testing.assert_close(model(X, T, Y), expected)
    assert len(seen) >= 2


def test_a_wrapper_hands_rows_on_only_to_what_takes_them() -> None:
    class Own(Attention):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)

    class Around(nn.Module):
        def __init__(self, attn: nn.Module) -> None:
            super().__init__()
            self.attn = attn

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return self.attn(*args, **kwargs)

    model, _ = pair(MDTv2)
    plan = model.draw_plan(3, X.device)
    expected = model(X, T, Y, mask_plan=plan)
    for block in model.every_block():
        block.attn.__class__ = Own
        block.attn = Around(block.attn)
    torch.testing.assert_close(model(X, T, Y, mask_plan=plan), expected)
