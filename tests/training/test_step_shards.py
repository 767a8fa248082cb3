"""``TrainingStep`` of models that FSDP2 shards, here over one process."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

from mdt_fast import TrainingStep, create_diffusion
from mdt_fast.errors import UserError
from mdt_fast.training.parallelize import METHODS
from small_models import made
from tolerances import relative_error

DIFFUSION = create_diffusion()


@pytest.fixture(autouse=True)
def alone(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def batch(B: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(B, 4, 8, 8, generator=generator), torch.randint(10, (B,), generator=generator)


def shard(model: Any, **how: Any) -> None:
    for block in model.every_block():
        fully_shard(block, **how)
    finish(model, **how)


def finish(model: nn.Module, **how: Any) -> None:
    fully_shard(model, **how)
    for name in METHODS:
        register_fsdp_forward_method(model, name)


def test_shards() -> None:
    """The same gradients; no graphs."""
    model = made("mdtv2", torch.float32, mask_ratio=0.3).train()
    whole, (x, y) = TrainingStep(copy.deepcopy(model), DIFFUSION), batch()
    for block in model.every_block():
        fully_shard(block)
    with pytest.raises(UserError, match="model: its blocks are sharded but it is not"):
        TrainingStep(model, DIFFUSION)
    finish(model)
    step = TrainingStep(model, DIFFUSION, accumulate=2)
    for seed in range(2):
        torch.manual_seed(seed)
        whole(x, y)
        torch.manual_seed(seed)
        for rows in (slice(2), slice(2, 4)):
            step(x[rows], y[rows])
        for a, e in zip(model.parameters(), whole.model.parameters(), strict=True):
            torch.testing.assert_close(a.grad.full_tensor(), e.grad, rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match="got a model that FSDP shards"):
        TrainingStep(model, DIFFUSION, cuda_graphs=True)


@pytest.mark.parametrize(
    ("passes", "mask_ratio", "accumulate"), [("in_turn", 0.3, 1), ("in_turn", 0.3, 2), ("together", None, 2)]
)
def test_shards_in_bfloat16(passes: Any, mask_ratio: Any, accumulate: int) -> None:
    """Gradients are not reduced after every backward pass, nor does every pass reach every block."""
    model = made("mdtv2", torch.float32, mask_ratio=mask_ratio).train()
    whole, (x, y) = TrainingStep(copy.deepcopy(model), DIFFUSION, passes=passes), batch()
    shard(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32))
    step = TrainingStep(model, DIFFUSION, accumulate=accumulate, passes=passes)
    torch.manual_seed(0)
    whole(x, y)
    torch.manual_seed(0)
    for rows in torch.arange(4).chunk(accumulate):
        step(x[rows], y[rows])
    for (name, a), e in zip(model.named_parameters(), whole.model.parameters(), strict=True):
        if e.grad is not None and not name.endswith("qkv.bias"):
            assert relative_error(a.grad.full_tensor(), e.grad) < 0.1, name
