"""A model made ready for training: checkpointing, then compilation, then FSDP2, block by block."""

import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import Shard

from ..config import TrainConfig
from ..errors import UserError
from ..models.base import Transformer
from ..models.compiling import compile_for_training
from ..models.float8 import use_float8
from .distributed import World

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
METHODS = ("training_step_outputs", "forward_with_cfg")
"""What is called beside ``forward``, and needs the parameters gathered as well."""
ALONE_BYTES, BUCKET_BYTES = 2**20, 2**25
"""Gradients of the first size and more are summed where they are, smaller ones together, up to the second."""


def parallelize(model: Transformer, config: TrainConfig, world: World, device: torch.device) -> bool:
    """Prepare ``model``, on its device already, for one of ``world``'s processes; whether it is sharded now.

    Of several processes each keeps a part of every parameter, in float32, and gathers a block's when it is
    due, in ``config.dtype``; gradients are averaged in float32. ``hybrid`` shards among the processes of a
    machine and keeps a replica on each. With ``ddp`` each has a replica, and :func:`sum_gradients` is to be
    called. Raises ``UserError`` for settings that do not go together.
    """
    if config.float8:
        use_float8(model, config.float8_by)
    model.set_checkpointing(config.checkpointing)
    sharded = world.size > 1 and config.parallel != "ddp"
    if config.compile == "model" and sharded:
        raise UserError(
            "train.compile: 'model' is for one process, or for train.parallel ddp; shards need 'block' "
            "(or 'none')"
        )
    if config.weights == "bfloat16" and sharded:
        raise UserError(
            "train.weights: 'bfloat16' is for one process, or for train.parallel ddp; with 'float32', which "
            "a run may go on with, several keep shards in that and gather them in train.dtype"
        )
    if config.compile != "none":
        compile_for_training(model, config.compile)
    if not sharded:
        return False
    # It warns of blocks that return views, which are not to be written to: nothing here does.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view", category=UserWarning)
    # torchtitan's order: a block is compiled inside, and gathered and sharded around that.
    mesh = mesh_of(config, world, device)
    policy = MixedPrecisionPolicy(
        param_dtype=DTYPES[config.dtype], reduce_dtype=torch.float32, output_dtype=torch.float32
    )
    inner = MixedPrecisionPolicy(param_dtype=DTYPES[config.dtype], reduce_dtype=torch.float32)
    shards = mesh["shard"].size()
    for block in model.every_block():
        fully_shard(block, mesh=mesh, mp_policy=inner)
    fully_shard(
        model, mesh=mesh, mp_policy=policy, shard_placement_fn=lambda p: Shard(sharded_dim(p.shape, shards))
    )
    for name in METHODS:
        if hasattr(model, name):
            register_fsdp_forward_method(model, name)
    return True


def sharded_dim(shape: Sequence[int], shards: int) -> int:
    """The dimension that a parameter of this shape is cut in, among ``shards`` processes.

    It is the first, which FSDP2 pads to even parts. A table in one row, as [1, L, D], would be padded to
    ``shards`` times its size, and sent so: the next dimension that comes out even is cut instead.
    """
    even = [dim for dim, size in enumerate(shape) if size > 1 and size % shards == 0]
    return even[0] if shape[0] == 1 and even else 0


def mesh_of(config: TrainConfig, world: World, device: torch.device) -> DeviceMesh:
    """One dimension to shard in, and with ``hybrid`` one of replicas, the machines, before it."""
    if config.parallel == "fsdp":
        return init_device_mesh(device.type, (world.size,), mesh_dim_names=("shard",))
    shards = world.local_size
    if world.size % shards:
        raise UserError(
            f"train.parallel: 'hybrid' needs as many processes on every machine; {world.size} do not "
            f"divide by the {shards} of this one"
        )
    shape = (world.size // shards, shards)
    return init_device_mesh(device.type, shape, mesh_dim_names=("replica", "shard"))


def autocasting(config: TrainConfig, sharded: bool, device: torch.device) -> Any:
    """The context of a forward pass: FSDP gathers parameters in their dtype, without it autocast casts. Casts
    are not kept: around another autocast they would outlive the step, and be read by its graph."""
    enabled = not sharded and config.dtype != "float32"
    return torch.autocast(device.type, DTYPES[config.dtype], enabled=enabled, cache_enabled=False)


def reduce_gradients(model: Any, sharded: bool, now: bool) -> None:
    """Whether the next backward pass ends with the gradients' reduction: only the last of several does."""
    if sharded:
        model.set_requires_gradient_sync(now)


def replicas(config: TrainConfig, world: World) -> int:
    """How many processes have all the weights, and a part of every batch."""
    return world.size if config.parallel == "ddp" else 1


@torch.no_grad()
def same_weights(model: Any) -> None:
    """Those of process 0 on all: replicas that differ once would go on differing."""
    for parameter in model.parameters():
        dist.broadcast(parameter, src=0)


@torch.no_grad()
def sum_gradients(parameters: Iterable[Tensor]) -> None:
    """Of all replicas, in place and in float32: small ones together, and those of half types, which are
    rounded once, where there is room for them.

    The same parameters must have gradients everywhere; the sums are the same bits everywhere.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    works = [dist.all_reduce(gradient, async_op=True) for gradient in gradients if _alone(gradient)]
    for bucket in _buckets([gradient for gradient in gradients if not _alone(gradient)]):
        flat = torch.cat([gradient.reshape(-1).float() for gradient in bucket])
        dist.all_reduce(flat)
        sums = flat.split([gradient.numel() for gradient in bucket])
        torch._foreach_copy_(bucket, [s.view(g.shape) for s, g in zip(sums, bucket, strict=True)])
    for work in works:
        work.wait()


def _alone(gradient: Tensor) -> bool:
    wide = gradient.dtype == torch.float32 and gradient.is_contiguous()
    return wide and gradient.nbytes >= ALONE_BYTES


def _buckets(gradients: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Of ``BUCKET_BYTES`` at most, in float32, or of one gradient."""
    bucket: list[Tensor] = []
    size = 0
    for gradient in gradients:
        if bucket and size + 4 * gradient.numel() > BUCKET_BYTES:
            yield bucket
            bucket, size = [], 0
        bucket.append(gradient)
        size += 4 * gradient.numel()
    if bucket:
        yield bucket


def split(rows: slice, parts: int) -> list[slice]:
    """A process's rows in ``parts`` equal pieces, one after the other, counted from its first."""
    size = (rows.stop - rows.start) // parts
    return [slice(i * size, (i + 1) * size) for i in range(parts)]


def rows_of(world: World, config: TrainConfig) -> slice:
    """The rows of every batch that this process computes. ``UserError`` if they do not come out even."""
    parts = world.size * config.accumulate
    if config.batch_size % parts:
        each = " times ".join(
            [f"{world.size} processes"] * (world.size > 1)
            + [f"{config.accumulate} accumulated parts"] * (config.accumulate > 1)
        )
        nearest = max(parts, round(config.batch_size / parts) * parts)
        raise UserError(
            f"train.batch_size: {config.batch_size} is not divisible by {each}; "
            f"the nearest that is: {nearest}"
        )
    size = config.batch_size // world.size
    return slice(world.rank * size, (world.rank + 1) * size)
