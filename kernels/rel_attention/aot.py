"""Kernels at the head sizes of the published models, 64 (S, B, L) and 72 (XL), to compile without a GPU."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import Any

from ..aot import Case
from .config import (
    KERNELS,
    MAX_HEAD_DIM,
    Kind,
    LaunchConfig,
    entry,
    gather_blocks,
    gathers_queries,
    kv_blocks,
    launch_configs,
    split_head,
    table_blocks,
)
from .kernel import DENSE, LOOKUP, NO_BIAS, rel_attention_fwd_kernel
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

HEAD_DIMS, DTYPES = (64, 72), ("bf16", "fp32")
KINDS: dict[str, Kind] = {"bf16": "half", "fp32": "float32"}
GRID = 16
BIASES = {"no bias": NO_BIAS, "lookup": LOOKUP, "dense": DENSE}


def cases(arch: str) -> Iterator[Case]:
    """Every kernel, for unmasked, masked and packed (ragged) batches, with the bias forms possible there."""
    for d, dtype in product(HEAD_DIMS, DTYPES):
        configs = launch_configs(arch, d, KINDS[dtype])
        for (form, bias), tokens in product(BIASES.items(), ("all", "kept", "packed")):
            if bias == NO_BIAS and tokens == "kept":
                continue  # without a bias, positions have no effect
            label = f"d={d} {tokens} {form} {dtype}"
            places = bias != NO_BIAS and tokens != "all"
            shape = _shape(d, dtype, arch) | {
                "BIAS": bias, "Q_POSITIONS": places, "K_POSITIONS": places, "RAGGED": tokens == "packed",
            }  # fmt: skip
            yield _case(
                rel_attention_fwd_kernel, label, shape | _blocks(configs.forward), d, dtype, configs.forward
            )
            yield _case(rel_attention_bwd_q_kernel, label, shape | _blocks(configs.q), d, dtype, configs.q)
            for store in (False, True) if bias == LOOKUP else (False,):
                launch = kv_blocks(configs, store, d, half=dtype == "bf16")
                constants = shape | _blocks(launch) | {"STORE": store}
                name = f"d={d} {tokens} {form}{' store' if store else ''} {dtype}"
                yield _case(rel_attention_bwd_kv_kernel, name, constants, d, dtype, launch)
        for tokens in ("all", "kept", "packed"):
            slots = {"Q_SLOTS": tokens != "all", "K_SLOTS": tokens != "all", "RAGGED": tokens == "packed"}
            shape = _shape(d, dtype, arch) | slots
            label = f"d={d} {tokens} {dtype}"
            constants = shape | _blocks(configs.bias)
            yield _case(rel_attention_bwd_bias_kernel, label, constants, d, dtype, configs.bias)
            queries = gathers_queries(dtype == "bf16", GRID)
            gather = gather_blocks(configs, queries, GRID)
            constants = shape | _blocks(gather) | {"QUERIES": queries}
            del constants["DIRECT"]
            yield _case(rel_attention_bwd_gather_kernel, label, constants, d, dtype, gather, queries)
        for ragged in (False, True) if gathers_queries(dtype == "bf16", GRID) else ():
            label = f"d={d} {'packed' if ragged else 'all'} {dtype}"
            constants = {name: _shape(d, dtype, arch)[name] for name in ("D", "D0", "D1", "ALIGN")}
            constants |= {"RAGGED": ragged, "BLOCK_M": configs.q.block_m}
            launch = replace(configs.q, num_warps=4)
            yield _case(rel_attention_bwd_delta_kernel, label, constants, d, dtype, launch)
    yield from _wide_cases(arch)
    yield from _small_cases(arch)


def _wide_cases(arch: str) -> Iterator[Case]:
    """On NVIDIA, the cases with most registers: float32 at the widest head, and TF32 products."""
    if arch.startswith("gfx"):
        return
    most: list[tuple[int, Kind]] = [(MAX_HEAD_DIM, "float32")]
    most += [(d, "tf32") for d in (*HEAD_DIMS, MAX_HEAD_DIM)]
    for d, kind in most:
        configs = launch_configs(arch, d, kind)
        shape = _shape(d, "fp32", arch) | {"RAGGED": True, "PRECISION": "tf32" if kind == "tf32" else "ieee"}
        scores = shape | {"BIAS": LOOKUP, "Q_POSITIONS": True, "K_POSITIONS": True}
        stored = kv_blocks(configs, True, d, half=False)
        for what, kernel, launch, constants in (
            ("", rel_attention_fwd_kernel, configs.forward, scores),
            ("", rel_attention_bwd_q_kernel, configs.q, scores),
            ("", rel_attention_bwd_kv_kernel, configs.kv, scores | {"STORE": False}),
            (" store", rel_attention_bwd_kv_kernel, stored, scores | {"STORE": True}),
            ("", rel_attention_bwd_bias_kernel, configs.bias, shape | {"Q_SLOTS": True, "K_SLOTS": True}),
        ):
            if what and (kind != "tf32" or d == MAX_HEAD_DIM):
                continue
            label = f"d={d} packed{what} {kind}"
            yield _case(kernel, label, constants | _blocks(launch), d, "fp32", launch, kind=kind)


def _small_cases(arch: str) -> Iterator[Case]:
    """The kernels that do not depend on the head size."""
    launch = LaunchConfig(block_m=32, block_n=64, num_warps=4, num_stages=2)
    constants = {"G": GRID, "BLOCK_M": 16, "BLOCK_N": 128}
    yield _case(rel_attention_bias_kernel, "fp32", constants, 64, "fp32", launch)
    constants = {"G": GRID, **table_blocks(arch, GRID)}
    yield _case(rel_attention_bwd_table_kernel, "fp32", constants, 64, "fp32", launch)
    yield _case(
        rel_attention_slots_kernel, "i64", {"G": GRID, "RAGGED": True, "BLOCK": 256}, 64, "i64", launch
    )


def _shape(head_dim: int, dtype: str, arch: str) -> dict[str, Any]:
    first, rest = split_head(head_dim)
    return {"G": GRID, "D": head_dim, "D0": first, "D1": rest, "ALIGN": 8, "PRECISION": "ieee",
            "DIRECT": not arch.startswith("gfx")}  # fmt: skip


def _blocks(launch: LaunchConfig) -> dict[str, Any]:
    return {"BLOCK_M": launch.block_m, "BLOCK_N": launch.block_n}


def _case(
    kernel: Any,
    label: str,
    constants: dict[str, Any],
    head_dim: int,
    dtype: str,
    launch: LaunchConfig,
    tunable: bool = True,
    kind: Kind | None = None,
) -> Case:
    op = kernel.__name__.removesuffix("_kernel")
    dtypes = {name: _dtype(name, dtype) for name in kernel.arg_names if name not in constants}
    # The row stride of a head is a multiple of 16 in all published models; the head stride is not at 72.
    aligned = {name for name in dtypes if name.endswith("_ptr") or name.startswith("stride")}
    if head_dim % 16:
        aligned -= {name for name in aligned if name.startswith("stride") and name.endswith("h")} - {
            "stride_dsh"
        }
    return Case(
        kernel=kernel,
        label=label,
        dtypes=dtypes,
        constants=constants,
        aligned=frozenset(aligned),
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
        entry=entry(op, head_dim, kind or KINDS[dtype]) if tunable and op in KERNELS.values() else None,
    )


def _dtype(name: str, dtype: str) -> str:
    if name in ("q_pos_ptr", "k_pos_ptr", "pos_ptr"):
        return "*i64"
    if name.endswith(("offsets_ptr", "slots_ptr", "placed_ptr")):
        return "*i32"
    if name in ("lse_ptr", "delta_ptr", "bias_ptr", "dbias_ptr", "table_ptr", "dtable_ptr"):
        return "*fp32"
    if name.endswith("_ptr"):
        return f"*{dtype}"
    return "fp32" if name == "scale" else "i32"
