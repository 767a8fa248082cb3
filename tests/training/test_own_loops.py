"""Users' own training loops on several processes, as in the README: FSDP2 and DDP."""

import copy
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from mdt_fast import MaskPlan, MDTv2, UserError, create_diffusion, load_weights
from mdt_fast.models.blocks import Embedded
from ranks import run_ranks
from tolerances import FLOAT32

pytestmark = pytest.mark.slow

SHAPE = {"input_size": 8, "patch_size": 2, "hidden_size": 32, "depth": 4, "num_heads": 2, "num_classes": 3}
Loss = Callable[[nn.Module, slice], Tensor]


def losses() -> tuple[Loss, Loss]:
    """Losses of some rows of one batch: both passes of the objective in one step, and one by one."""
    draw, diffusion = torch.Generator().manual_seed(1), create_diffusion()
    x, noise, noise_masked = (torch.randn(4, 4, 8, 8, generator=draw) for _ in range(3))
    t, y = torch.tensor([3, 700, 5, 900]), torch.tensor([0, 2, 1, 1])
    order = torch.rand(4, 16, generator=draw)

    def together(model: nn.Module, rows: slice) -> Tensor:
        plan = MaskPlan.from_noise(order[rows], 9, ascending=True)
        terms = diffusion.two_pass_losses(
            model, x[rows], t[rows], y[rows], y[rows],
            noise=noise[rows], noise_masked=noise_masked[rows], mask_plan=plan,
        )  # fmt: skip
        return (terms["loss"] + terms["m_loss"]).mean()

    def one_by_one(model: nn.Module, rows: slice) -> Tensor:
        masked = {
            "enable_mask": True,
            "mask_plan": MaskPlan.from_noise(order[rows], 9, ascending=True),
            "y": y[rows],
        }
        full = diffusion.training_losses(model, x[rows], t[rows], {"y": y[rows]}, noise[rows])
        terms = diffusion.training_losses(model, x[rows], t[rows], masked, noise_masked[rows])
        return (full["loss"] + terms["loss"]).mean()

    return together, one_by_one


def same_gradients(ours: Sequence[nn.Parameter], theirs: Sequence[nn.Parameter]) -> None:
    for p, q in zip(ours, theirs, strict=True):
        if q.grad is None:
            assert p.grad is None
            continue
        gradient = p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
        assert gradient is not None
        assert (gradient - q.grad).norm() <= FLOAT32 * q.grad.norm() + 1e-7


def on_two(rank: int) -> None:
    torch.manual_seed(0)
    plain = MDTv2(**SHAPE, decode_layer=2, mask_ratio=0.3, class_dropout_prob=0.1).eval()
    for parameter in plain.parameters():
        if not parameter.any():
            parameter.data.normal_(std=0.1)
    together, one_by_one = losses()
    together(plain, slice(0, 4)).backward()
    mine = slice(2 * rank, 2 * rank + 2)

    mesh = init_device_mesh("cpu", (2,))
    for registered in (False, True):
        sharded = copy.deepcopy(plain)
        sharded.zero_grad()
        for block in sharded.every_block():
            fully_shard(block, mesh=mesh)
        fully_shard(sharded, mesh=mesh)
        if registered:
            register_fsdp_forward_method(sharded, "training_step_outputs")
        embed, skips = sharded.embed, []
        sharded.embed = lambda *args, embed=embed, skips=skips: skips.append(embed(*args)) or skips[-1]
        with pytest.raises(UserError, match="model: is sharded by FSDP2; load its weights before, or by"):
            load_weights(sharded, plain.state_dict())
        together(sharded, mine).backward()
        # The embedded input is used without being materialised, while the weights are still shards.
        assert [type(skip) for _, skip in skips] == [Embedded, Embedded]
        same_gradients(list(sharded.parameters()), list(plain.parameters()))

    for loss in (together, one_by_one):
        replicated = DistributedDataParallel(copy.deepcopy(plain))
        replicated.zero_grad()
        loss(replicated, mine).backward()
        same_gradients(list(replicated.module.parameters()), list(plain.parameters()))


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")
def test_gradients_are_those_of_the_whole_batch_on_one(tmp_path: Path) -> None:
    run_ranks(tmp_path, on_two)
