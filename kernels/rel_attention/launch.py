"""Launches of the Triton kernels. q, k, v and their gradients are strided [B, H, rows, d]."""

from math import gcd
from typing import Any

import torch
import triton
from torch import Tensor

from ..backends import INTERPRETING, tf32
from ..checks import cast
from ..launcher import launch
from ..launches import architecture, capability, cdiv, remembered
from . import config
from .call import Call, Side
from .kernel import DENSE, LOG2E, LOOKUP, NO_BIAS, rel_attention_fwd_kernel
from .kernel_bwd import (
    rel_attention_bwd_delta_kernel,
    rel_attention_bwd_kv_kernel,
    rel_attention_bwd_q_kernel,
)
from .kernel_table import (
    rel_attention_bias_kernel,
    rel_attention_bwd_bias_kernel,
    rel_attention_bwd_gather_kernel,
    rel_attention_bwd_table_kernel,
    rel_attention_slots_kernel,
)


def forward(
    q_BHMd: Tensor, k_BHNd: Tensor, v_BHNd: Tensor, table_RH: Tensor | None, call: Call, out_BHMd: Tensor
) -> Tensor:
    """Write ``out``; returns log(sum(exp(score))) as float32 [H, all rows of q]."""
    q_BHMd = aligned(q_BHMd, call.queries.length)
    k_BHNd, v_BHNd = (aligned(x, call.keys.length) for x in (k_BHNd, v_BHNd))
    B, H, rows = call.queries.batch, q_BHMd.shape[1], q_BHMd.shape[0] * q_BHMd.shape[2]
    lse = q_BHMd.new_empty(H, rows, dtype=torch.float32)
    choice = _configs(q_BHMd).forward
    n_blocks = cdiv(call.queries.length, choice.block_m)
    if B * H * n_blocks and rows:
        bias, bias_size, form = _bias(q_BHMd, table_RH, call)
        strides = _strides(q_BHMd, k_BHNd, v_BHNd, out_BHMd)
        launch(
            rel_attention_fwd_kernel, (B * H * n_blocks,),
            q_BHMd, k_BHNd, v_BHNd, *_scene(q_BHMd, bias, call), out_BHMd, lse,
            H, call.queries.length, call.keys.length, rows, n_blocks, bias_size, call.scale, *strides,
            BIAS=form, **_constants(call, q_BHMd, strides), **_blocks(choice),
        )  # fmt: skip
    return lse


def backward(
    dout_BHMd: Tensor,
    q_BHMd: Tensor,
    k_BHNd: Tensor,
    v_BHNd: Tensor,
    table_RH: Tensor | None,
    out_BHMd: Tensor,
    lse: Tensor,
    call: Call,
    dq_BHMd: Tensor,
    dk_BHNd: Tensor,
    dv_BHNd: Tensor,
    dtable_RH: Tensor | None,
) -> None:
    """Write the gradients of q, k and v, and that of the table if ``dtable`` (initially zeros) is given."""
    B, H, rows = call.queries.batch, q_BHMd.shape[1], q_BHMd.shape[0] * q_BHMd.shape[2]
    lengths = call.queries.length, call.keys.length
    if not rows or not k_BHNd.numel() or not min(lengths):
        dq_BHMd.zero_(), dk_BHNd.zero_(), dv_BHNd.zero_()
        return
    dout_BHMd, q_BHMd = (aligned(x, lengths[0]) for x in (dout_BHMd, q_BHMd))
    k_BHNd, v_BHNd = (aligned(x, lengths[1]) for x in (k_BHNd, v_BHNd))
    if out_BHMd.stride() != dout_BHMd.stride():  # the kernels read both with the same strides
        out_BHMd = torch.empty_like(dout_BHMd).copy_(out_BHMd)
    delta = torch.empty_like(lse)
    bias, bias_size, form = _bias(q_BHMd, table_RH, call)
    scene = _scene(q_BHMd, bias, call)
    configs = _configs(q_BHMd)
    store = dtable_RH is not None and call.table_grad == "store"
    # Whether dq is computed from the stored dS, too.
    queries = store and config.gathers_queries(q_BHMd.element_size() == 2, call.grid_size)

    n_blocks = cdiv(lengths[0], configs.q.block_m)
    if queries:
        strides = _strides(dout_BHMd)
        constants = _constants(call, dout_BHMd, strides)
        launch(
            rel_attention_bwd_delta_kernel, (B * H * n_blocks,),
            out_BHMd, dout_BHMd, _or(call.queries.offsets, q_BHMd), delta,
            H, lengths[0], rows, n_blocks, *strides,
            **{name: constants[name] for name in ("RAGGED", "D", "D0", "D1", "ALIGN")},
            BLOCK_M=configs.q.block_m, num_warps=4,
        )  # fmt: skip
    else:
        strides = _strides(q_BHMd, k_BHNd, v_BHNd, dout_BHMd, dq_BHMd)
        launch(
            rel_attention_bwd_q_kernel, (B * H * n_blocks,),
            q_BHMd, k_BHNd, v_BHNd, *scene, out_BHMd, dout_BHMd, lse, delta, dq_BHMd,
            H, *lengths, rows, n_blocks, bias_size, call.scale, *strides,
            BIAS=form, **_constants(call, q_BHMd, strides), **_blocks(configs.q),
        )  # fmt: skip

    chunk, ds = B, q_BHMd
    if store:
        L, gather = call.grid_size**2, config.gather_blocks(configs, queries, call.grid_size)
        n_rows = cdiv(L, gather.block_m)
        row = n_rows * gather.block_m
        chunk = max(1, min(B, config.DS_BYTES // (H * lengths[1] * row * q_BHMd.element_size())))
        ds = q_BHMd.new_empty(chunk, H, lengths[1], row)
        parts = config.gather_parts(chunk, n_rows * cdiv(L, gather.block_n) * H)
        sums = q_BHMd.new_empty(parts, H, L * L, dtype=torch.float32)
        slots = _slots(call, B)
    kv = config.kv_blocks(configs, store, q_BHMd.shape[3], q_BHMd.element_size() == 2)
    n_blocks = cdiv(lengths[1], kv.block_n)
    strides = _strides(q_BHMd, k_BHNd, v_BHNd, dout_BHMd, dk_BHNd, dv_BHNd)
    constants = _constants(call, q_BHMd, strides)
    for first in range(0, B, chunk):
        samples = min(chunk, B - first)
        launch(
            rel_attention_bwd_kv_kernel, (samples * H * n_blocks,),
            q_BHMd, k_BHNd, v_BHNd, *scene, dout_BHMd, lse, delta, dk_BHNd, dv_BHNd, ds,
            first, H, *lengths, rows, n_blocks, bias_size, call.scale, *strides, ds.stride(1), ds.stride(2),
            BIAS=form, STORE=store, **constants, **_blocks(kv),
        )  # fmt: skip
        if store:
            _gather(ds, k_BHNd, slots, call, first, samples, gather, dq_BHMd if queries else None, sums)
    if store and dtable_RH is not None:
        _table(sums, dtable_RH, 0, call)
    elif dtable_RH is not None and table_RH is not None:
        if form != LOOKUP:
            bias, bias_size, _ = _bias(q_BHMd, table_RH, call._replace(bias_form="lookup"))
        _recompute(dout_BHMd, q_BHMd, k_BHNd, v_BHNd, bias, bias_size, lse, delta, call, dtable_RH)


def aligned(x: Tensor, length: int) -> Tensor:
    """``x``, or a copy if the kernels cannot address ``x`` itself.

    A copy is made if the rows of a head, of which a sample has ``length``, are too far apart, or if rows of a
    half type do not begin at multiples of 16 bytes. Without that alignment, loads through shared memory are
    not pipelined, and ptxas 12.8 (of Triton 3.6 and 3.7) then miscompiles the narrow part of a head on
    Hopper: the code reads a descriptor that was never written.
    """
    # The rows of a head are addressed with 32 bits, from the sample's first row.
    if (min(x.shape[2], length) - 1) * x.stride(2) >= 2**31:
        return x.clone(memory_format=torch.contiguous_format)
    if x.element_size() != 2:
        return x
    for step, n in zip(x.stride(), x.shape[:-1]):
        if n > 1 and step % config.EIGHT:
            return x.clone(memory_format=torch.contiguous_format)
    return x if x.data_ptr() % (2 * config.EIGHT) == 0 else x.clone()  # keeps the strides


def _recompute(
    dout_BHMd: Tensor,
    q_BHMd: Tensor,
    k_BHNd: Tensor,
    v_BHNd: Tensor,
    bias: Tensor,
    bias_size: int,
    lse: Tensor,
    delta: Tensor,
    call: Call,
    dtable_RH: Tensor,
) -> None:
    """The table's gradient by ``recompute``, some heads at a time; ``bias`` is in its LOOKUP form."""
    B, H, L = call.queries.batch, q_BHMd.shape[1], call.grid_size**2
    choice = _configs(q_BHMd).bias
    n_blocks = cdiv(L, choice.block_n)
    tiles = n_blocks * cdiv(L, choice.block_m)
    parts = config.bias_parts(B, tiles * H)
    heads = max(1, min(H, config.DBIAS_BYTES // (4 * parts * L * L)))
    sums = q_BHMd.new_empty(parts, heads, L * L, dtype=torch.float32)
    q_slots, k_slots = _slots(call, B)
    strides = _strides(q_BHMd, k_BHNd, v_BHNd, dout_BHMd)
    constants = _constants(call, q_BHMd, strides)
    del constants["Q_POSITIONS"], constants["K_POSITIONS"]
    for first in range(0, H, heads):
        some = min(heads, H - first)
        launch(
            rel_attention_bwd_bias_kernel, (tiles, some, parts),
            q_BHMd, k_BHNd, v_BHNd, bias, _or(q_slots, q_BHMd), _or(k_slots, q_BHMd),
            _or(call.queries.offsets, q_BHMd), _or(call.keys.offsets, q_BHMd), dout_BHMd, lse, delta, sums,
            B, first, some, call.queries.length, call.keys.length, lse.shape[1], n_blocks, bias_size,
            call.scale, *strides,
            Q_SLOTS=q_slots is not None, K_SLOTS=k_slots is not None, **constants, **_blocks(choice),
        )  # fmt: skip
        _table(sums.flatten(0, 1)[: parts * some].view(parts, some, -1), dtable_RH, first, call)


def _gather(
    ds: Tensor,
    k_BHNd: Tensor,
    slots: tuple[Tensor | None, Tensor | None],
    call: Call,
    first: int,
    samples: int,
    choice: config.LaunchConfig,
    dq_BHMd: Tensor | None,
    sums: Tensor,
) -> None:
    """Add the stored dS of ``samples`` samples from ``first`` on to ``sums``; write ``dq`` if it is given."""
    H, L, (q_slots, k_slots) = ds.shape[1], call.grid_size**2, slots
    n_blocks, dq = cdiv(L, choice.block_n), k_BHNd if dq_BHMd is None else dq_BHMd
    strides = _strides(k_BHNd, dq)
    constants = _constants(call, k_BHNd, strides)
    del constants["Q_POSITIONS"], constants["K_POSITIONS"], constants["DIRECT"]
    launch(
        rel_attention_bwd_gather_kernel, (n_blocks * cdiv(L, choice.block_m), H, len(sums)),
        ds, k_BHNd, _or(q_slots, ds), _or(k_slots, ds), _or(call.queries.offsets, ds),
        _or(call.keys.offsets, ds), dq, sums, first, samples, H, call.queries.length, call.keys.length,
        n_blocks, call.scale, ds.stride(1), ds.stride(2), *strides,
        Q_SLOTS=q_slots is not None, K_SLOTS=k_slots is not None, QUERIES=dq_BHMd is not None,
        **constants, **_blocks(choice),
    )  # fmt: skip


def _table(sums: Tensor, dtable_RH: Tensor, first: int, call: Call) -> None:
    """Write the table's gradient from sums over samples [parts, heads from ``first``, G*G * G*G]."""
    G = call.grid_size
    launch(
        rel_attention_bwd_table_kernel, (2 * G - 1, sums.shape[1]),
        sums, dtable_RH, first, sums.shape[0], sums.shape[1], dtable_RH.shape[1],
        G=G, **config.table_blocks(_architecture(dtable_RH), G), num_warps=4,
    )  # fmt: skip


def _bias(q_BHMd: Tensor, table_RH: Tensor | None, call: Call) -> tuple[Tensor, int, int]:
    """The tensor from which the kernels read biases, its size per head, and its form."""
    if table_RH is None:
        return q_BHMd, 0, NO_BIAS
    R, H = table_RH.shape
    # Contiguous per head: 4 KB at 16 x 16 tokens, which stays in the L1 cache.
    table_HR = table_RH.new_empty(H, R, dtype=torch.float32)
    torch.mul(cast(table_RH.t(), torch.float32), LOG2E.value, out=table_HR)
    if call.bias_form == "lookup":
        return table_HR, R, LOOKUP
    L = call.grid_size**2
    # Float32: half types would save bytes, but the pipeline can prefetch 4-byte loads, not 2-byte ones.
    bias_HLL = q_BHMd.new_empty(H, L, L, dtype=torch.float32)
    grid = (cdiv(L, 128), cdiv(L, 16), H)
    launch(
        rel_attention_bias_kernel, grid,
        table_HR, bias_HLL, R, G=call.grid_size, BLOCK_M=16, BLOCK_N=128, num_warps=4,
    )  # fmt: skip
    return bias_HLL, L * L, DENSE


def _slots(call: Call, batch: int) -> tuple[Tensor | None, Tensor | None]:
    """The token at each grid position, int32 [B, G*G], for queries and for keys; None: the grid in order."""
    queries = _slots_of(call.queries, call.grid_size, batch)
    if call.keys.pos is call.queries.pos and call.keys.offsets is call.queries.offsets:
        return queries, queries
    return queries, _slots_of(call.keys, call.grid_size, batch)


def _slots_of(side: Side, G: int, batch: int) -> Tensor | None:
    if side.pos is None:
        return None
    slots = side.pos.new_empty(batch, G * G, dtype=torch.int32)
    placed = side.pos.new_empty(batch, dtype=torch.int32)
    launch(
        rel_attention_slots_kernel, (batch,),
        side.pos, _or(side.offsets, side.pos), slots, placed, side.length,
        RAGGED=side.offsets is not None, G=G,
        BLOCK=min(1024, triton.next_power_of_2(G * G)), num_warps=4,
    )  # fmt: skip
    # This does not synchronise with the device. CPU tensors were checked before.
    torch._assert_async(
        placed.all(), "q_pos, k_pos: two tokens of a sample stand at one position, or outside"
    )
    return slots


def _scene(q_BHMd: Tensor, bias: Tensor, call: Call) -> tuple[Tensor, ...]:
    """Bias, positions and offsets as the kernels take them, with q as the placeholder for missing ones."""
    sides = call.queries, call.keys
    return bias, *(_or(side.pos, q_BHMd) for side in sides), *(_or(side.offsets, q_BHMd) for side in sides)


def _or(x: Tensor | None, unused: Tensor) -> Tensor:
    return unused if x is None else x


def _strides(*tensors_BHRd: Tensor) -> tuple[int, ...]:
    """The first three strides of each tensor; 0 for dimensions of size 1, whose strides mean nothing."""
    return _steps(*[(x.shape, x.stride()) for x in tensors_BHRd])


@remembered
def _steps(*layouts: tuple[torch.Size, tuple[int, ...]]) -> tuple[int, ...]:
    steps: list[int] = []
    for (B, H, R, _), (sample, head, row, _) in layouts:
        steps += (sample if B > 1 else 0, head if H > 1 else 0, row if R > 1 else 0)
    return (*steps,)


def _constants(call: Call, x_BHRd: Tensor, strides: tuple[int, ...]) -> dict[str, Any]:
    """The compile-time constants of a launch on tensors like ``x`` with these strides."""
    positions = call.queries.pos is not None, call.keys.pos is not None
    rest = call.ragged, call.grid_size, x_BHRd.shape[3], strides, _kind(x_BHRd), x_BHRd.is_cuda
    return {**_constants_of(*positions, *rest)}


@remembered
def _constants_of(
    q_positions: bool,
    k_positions: bool,
    ragged: bool,
    G: int,
    head_dim: int,
    strides: tuple[int, ...],
    kind: config.Kind,
    cuda: bool,
) -> dict[str, Any]:
    first, rest = config.split_head(head_dim)
    aligned = gcd(head_dim, *strides) % 8 == 0
    return {
        "Q_POSITIONS": q_positions, "K_POSITIONS": k_positions,
        "RAGGED": ragged, "G": G, "D": head_dim, "D0": first, "D1": rest,
        "ALIGN": 8 if aligned else 1, "PRECISION": "tf32" if kind == "tf32" else "ieee",
        "DIRECT": cuda and torch.version.hip is None and not INTERPRETING,
    }  # fmt: skip


def _blocks(choice: config.LaunchConfig) -> dict[str, int]:
    return {
        "BLOCK_M": choice.block_m, "BLOCK_N": choice.block_n,
        "num_warps": choice.num_warps, "num_stages": choice.num_stages,
    }  # fmt: skip


def _configs(q_BHMd: Tensor) -> config.LaunchConfigs:
    return _configs_of(_architecture(q_BHMd), q_BHMd.shape[3], _kind(q_BHMd))


_configs_of = remembered(config.launch_configs)


def _kind(x: Tensor) -> config.Kind:
    """The kind of products; float32 uses TF32 if PyTorch's own products do and the kernels can."""
    if x.element_size() == 2:
        return "half"
    if x.is_cuda and tf32() and config.in_tf32(x.shape[-1]) and capability(x.device.index) >= (8, 0):
        return "tf32"
    return "float32"


def _architecture(x: Tensor) -> str:
    return architecture(x.device.index) if x.is_cuda else "interpreter"
