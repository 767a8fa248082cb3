"""Prepares a model for training: activation checkpointing, then compilation, then FSDP2, block by block."""

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
"""Methods besides ``forward`` that need the parameters gathered."""
ALONE_BYTES, BUCKET_BYTES = 2**20, 2**25
"""Gradients of at least the first size are reduced in place; smaller ones in buckets of up to the second."""


def parallelize(model: Transformer, config: TrainConfig, world: World, device: torch.device) -> bool:
    """Prepare ``model``, already on its device, for this process; returns whether it is now sharded.

    With several processes each keeps a float32 shard of every parameter and gathers a block's parameters when
    needed, in ``config.dtype``; gradients are averaged in float32. ``hybrid`` shards within a node and keeps
    a replica on each node. With ``ddp`` each process has a replica, and the caller must call
    :func:`sum_gradients`. Raises ``UserError`` for incompatible settings.
    """
    if config.float8:
        use_float8(model, config.float8_by)
    model.set_checkpointing(config.checkpointing)
    sharded = world.size > 1 and config.parallel != "ddp"
    if config.compile == "model" and sharded:
        raise UserError(
            "train.compile: 'model' needs one process, or train.parallel ddp; with shards use 'block' "
            "or 'none'"
        )
    if config.weights == "bfloat16" and sharded:
        raise UserError(
            "train.weights: 'bfloat16' needs one process, or train.parallel ddp; with 'float32', which may "
            "be set on resume, shards are kept in float32 and gathered in train.dtype"
        )
    if config.compile != "none":
        compile_for_training(model, config.compile)
    if not sharded:
        return False
    # FSDP2 warns about blocks that return views, which must not be written to; nothing here writes to them.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view", category=UserWarning)
    # torchtitan's order: compile each block first, then wrap it with sharding.
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
    """The dimension in which a parameter of this shape is sharded among ``shards`` processes.

    It is the first, which FSDP2 pads to even parts. A table with one row, such as [1, L, D], would be padded
    to ``shards`` times its size and sent like that, so the next evenly divisible dimension is used instead.
    """
    even = [dim for dim, size in enumerate(shape) if size > 1 and size % shards == 0]
    return even[0] if shape[0] == 1 and even else 0


def mesh_of(config: TrainConfig, world: World, device: torch.device) -> DeviceMesh:
    """The device mesh: one dimension of shards, and with ``hybrid`` one of replicas (nodes) before it."""
    if config.parallel == "fsdp":
        return init_device_mesh(device.type, (world.size,), mesh_dim_names=("shard",))
    shards = world.local_size
    if world.size % shards:
        raise UserError(
            f"train.parallel: 'hybrid' needs the same number of processes on every node; {world.size} is not "
            f"divisible by the {shards} of this one"
        )
    shape = (world.size // shards, shards)
    return init_device_mesh(device.type, shape, mesh_dim_names=("replica", "shard"))


def autocasting(config: TrainConfig, sharded: bool, device: torch.device) -> Any:
    """The context of a forward pass: FSDP gathers parameters in the compute dtype; without it autocast casts
    them. Casts are not cached: inside another autocast they would outlive the step, and its graph would read
    them."""
    enabled = not sharded and config.dtype != "float32"
    return torch.autocast(device.type, DTYPES[config.dtype], enabled=enabled, cache_enabled=False)


def set_gradient_sync(model: Any, sharded: bool, on: bool) -> None:
    """Set whether the next backward pass reduces FSDP's gradients; of several, only the last should."""
    if sharded:
        model.set_requires_gradient_sync(on)


def replicas(config: TrainConfig, world: World) -> int:
    """Number of processes that each hold all the weights and handle a part of every batch."""
    return world.size if config.parallel == "ddp" else 1


@torch.no_grad()
def same_weights(model: Any) -> None:
    """Broadcast rank 0's weights to all ranks: replicas that differ once would stay different."""
    for parameter in model.parameters():
        dist.broadcast(parameter, src=0)


@torch.no_grad()
def sum_gradients(parameters: Iterable[Tensor]) -> None:
    """Sum gradients over all replicas, in place and in float32. Small ones are summed in float32 buckets, as
    are half-precision ones, which are then rounded once.

    The same parameters must have gradients on all ranks; the sums are bit-identical on all ranks.
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
    """Group gradients into buckets of at most ``BUCKET_BYTES`` in float32, or of a single gradient."""
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
    """Split a process's rows into ``parts`` equal consecutive slices, counted from its first row."""
    size = (rows.stop - rows.start) // parts
    return [slice(i * size, (i + 1) * size) for i in range(parts)]


def rows_of(world: World, config: TrainConfig) -> slice:
    """The rows of every batch that this process computes. ``UserError`` if they do not divide evenly."""
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
