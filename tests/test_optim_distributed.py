"""The fused optimisers over several ranks (gloo, CPU): global norm, sharded parameters, checkpoints."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from mdt_fast.errors import UserError
from mdt_fast.optim import FusedAdamW, FusedAdan
from ranks import run_ranks

BOTH = pytest.mark.parametrize("cls", [FusedAdan, FusedAdamW])
CLIP = 0.05  # far below the norms here


def build() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


def set_grads(model: nn.Module, step: int) -> None:
    """The same whole gradients on all ranks; each keeps the part of its own shard."""
    torch.manual_seed(50 + step)
    for p in model.parameters():
        whole = torch.randn(p.shape).to(p.dtype)
        sharded = isinstance(p, DTensor)
        p.grad = distribute_tensor(whole, p.device_mesh, p.placements) if sharded else whole


def whole(tensors: Any) -> list[Tensor]:
    return [t.full_tensor() if isinstance(t, DTensor) else t.detach().clone() for t in tensors]


def trained(cls: Any, count: int = 3, **options: Any) -> tuple[nn.Module, Any, list[Tensor]]:
    """The unsharded run that all others are compared with."""
    model = build()
    optimizer = cls(model.parameters(), lr=1e-2, max_grad_norm=CLIP, **options)
    ema = whole(model.parameters())
    optimizer.add_ema(ema, 0.9)
    for step in range(count):
        set_grads(model, step)
        optimizer.step()
    return model, optimizer, ema


def near(actual: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(actual, expected):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def check_checkpoint(model: nn.Module, optimizer: Any, expected: list[Tensor], **sharding: Any) -> None:
    """Load torch.distributed.checkpoint's state into a fresh optimiser, which must go on as the first."""
    saved = dcp.get_optimizer_state_dict(model, optimizer)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    fresh = build()
    if sharding:
        fully_shard(fresh, **sharding)
    fresh.load_state_dict(weights)
    other = type(optimizer)(fresh.parameters(), max_grad_norm=CLIP)
    dcp.set_optimizer_state_dict(fresh, other, saved)
    for step in (3, 4):
        set_grads(fresh, step)
        other.step()
    near(whole(fresh.parameters()), expected)


@BOTH
@pytest.mark.usefixtures("one_rank")
def test_distributed_checkpoint_on_one_rank(cls: Any) -> None:
    model, optimizer, _ = trained(cls)
    expected, _, _ = trained(cls, 5)
    check_checkpoint(model, optimizer, whole(expected.parameters()))


@BOTH
@pytest.mark.usefixtures("one_rank")
def test_gradients_that_are_not_placed_as_their_parameters(cls: Any) -> None:
    mesh = init_device_mesh("cpu", (1,))
    p = nn.Parameter(distribute_tensor(torch.ones(4), mesh, [Replicate()]))
    p.grad = DTensor.from_local(torch.ones(4), mesh, [Partial()])
    with pytest.raises(UserError, match=r"parameter 0: its gradient's placements are \(Partial"):
        cls([p]).step()


def sharded(rank: int, cls: Any, dtype: torch.dtype) -> None:
    expected, plain, expected_ema = trained(cls)
    mesh = init_device_mesh("cpu", (2,))
    model = fully_shard(build(), mesh=mesh).to(dtype)
    optimizer = cls(model.parameters(), lr=1e-2, max_grad_norm=CLIP)
    ema = [p.detach().float().clone() for p in model.parameters()]
    optimizer.add_ema(ema, 0.9)
    for step in range(3):
        set_grads(model, step)
        optimizer.step()
    if dtype == torch.bfloat16:
        masters = [optimizer.state[p]["master"] for p in model.parameters()]
        assert all(isinstance(m, DTensor) and m.dtype == torch.float32 for m in masters)
        assert all(
            torch.equal(m.to_local().bfloat16(), p.to_local()) for m, p in zip(masters, model.parameters())
        )
        return
    assert optimizer.grad_norm.item() == pytest.approx(plain.grad_norm.item(), rel=1e-6)
    near(whole(model.parameters()), whole(expected.parameters()))
    near(whole(ema), expected_ema)
    before = whole(model.parameters())
    set_grads(model, 9)
    if rank == 1:  # one rank's bad gradient keeps all from stepping
        next(model.parameters()).grad.to_local().fill_(float("nan"))  # type: ignore[union-attr]
    optimizer.step()
    assert optimizer.skipped_steps == 1
    assert all(torch.equal(a, b) for a, b in zip(whole(model.parameters()), before))
    after, _, _ = trained(cls, 5)
    check_checkpoint(model, optimizer, whole(after.parameters()), mesh=mesh)


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fsdp_on_two_ranks_is_the_unsharded_run(cls: Any, dtype: torch.dtype, tmp_path: Path) -> None:
    run_ranks(tmp_path, sharded, cls, dtype)


def split_by_parameter(rank: int, clip_norm: str) -> None:
    """Whole parameters on different ranks, as in ZeroRedundancyOptimizer; in the end rank 1 has no grads."""
    expected, plain, _ = trained(FusedAdan)
    model = build()
    mine = list(model.parameters())[rank::2]
    optimizer = FusedAdan(
        mine, lr=1e-2, max_grad_norm=CLIP, clip_norm=clip_norm, process_group=dist.group.WORLD
    )
    for step in range(3):
        set_grads(model, step)
        own = torch.stack([p.grad.norm() for p in mine if p.grad is not None]).norm().item()
        optimizer.step()
        norm = optimizer.grad_norm.item()
        assert norm == pytest.approx(own, rel=1e-6) if clip_norm == "rank" else norm > own
    if clip_norm == "global":
        near(whole(mine), whole(list(expected.parameters())[rank::2]))
        assert optimizer.grad_norm.item() == pytest.approx(plain.grad_norm.item(), rel=1e-6)
    before = whole(mine)
    optimizer.zero_grad()
    if rank == 0:
        mine[0].grad = torch.full_like(mine[0], float("inf"))
    optimizer.step()
    assert optimizer.skipped_steps == 1
    assert all(torch.equal(a, b) for a, b in zip(whole(mine), before))


@pytest.mark.parametrize("clip_norm", ["global", "rank"])
def test_parameters_split_among_ranks(clip_norm: str, tmp_path: Path) -> None:
    run_ranks(tmp_path, split_by_parameter, clip_norm)


def two_meshes(rank: int) -> None:
    """Sharded, replicated and plain parameters: each square is counted once."""
    mesh = init_device_mesh("cpu", (2,))
    values = [torch.arange(1.0, 5.0), torch.arange(2.0, 8.0), torch.ones(3)]
    norm = torch.cat(values).norm().item()
    params = [
        nn.Parameter(distribute_tensor(values[0], mesh, [Shard(0)])),
        nn.Parameter(distribute_tensor(values[1], mesh, [Replicate()])),
        nn.Parameter(values[2].clone()),
    ]
    for p in params:
        p.grad = p.detach().clone()
    optimizer = FusedAdamW(params)
    optimizer.step()
    assert optimizer.grad_norm.item() == pytest.approx(norm, rel=1e-6)


def test_each_square_is_counted_once(tmp_path: Path) -> None:
    run_ranks(tmp_path, two_meshes)
