"""The kernels at the published models' head sizes, 64 (S, B, L) and 72 (XL): compiling without a GPU."""

from collections.abc import Iterator
from itertools import product
from typing import Any

from ..aot import Case
from .config import KERNELS, LaunchConfig, entry, launch_configs, split_head, table_blocks
from .kernel import DENSE, LOOKUP, NO_BIAS, rel_attention_fwd_kernel
from .kernel_bwd import rel_attention_bwd_kv_kernel, rel_attention_bwd_q_kernel
from .kernel_table import (
    rel_attention_bias_kernel,
    rel_attention_bwd_bias_kernel,
    rel_attention_bwd_gather_kernel,
    rel_attention_bwd_table_kernel,
    rel_attention_slots_kernel,
)

HEAD_DIMS, DTYPES = (64, 72), ("bf16", "fp32")
GRID = 16
BIASES = {"no bias": NO_BIAS, "lookup": LOOKUP, "dense": DENSE}


def cases(arch: str) -> Iterator[Case]:
    """Every kernel: unmasked, masked and packed (ragged), each with the bias forms that it can meet there."""
    for d, dtype in product(HEAD_DIMS, DTYPES):
        configs = launch_configs(arch, d, half=dtype == "bf16")
        for (form, bias), tokens in product(BIASES.items(), ("all", "kept", "packed")):
            if bias == NO_BIAS and tokens == "kept":
                continue  # without a bias, positions mean nothing
            label = f"d={d} {tokens} {form} {dtype}"
            places = bias != NO_BIAS and tokens != "all"
            shape = _shape(d, dtype, arch) | {
                "BIAS": bias, "Q_POSITIONS": places, "K_POSITIONS": places, "RAGGED": tokens == "packed",
            }  # fmt: skip
            yield _case(
                rel_attention_fwd_kernel, label, shape | _blocks(configs.forward), d, dtype, configs.forward
            )
            for store in (False, True) if bias == LOOKUP else (False,):
                constants = shape | _blocks(configs.q) | {"STORE": store}
                name = f"d={d} {tokens} {form}{' store' if store else ''} {dtype}"
                yield _case(rel_attention_bwd_q_kernel, name, constants, d, dtype, configs.q)
            yield _case(rel_attention_bwd_kv_kernel, label, shape | _blocks(configs.kv), d, dtype, configs.kv)
        for tokens in ("all", "kept", "packed"):
            slots = {"Q_SLOTS": tokens != "all", "K_SLOTS": tokens != "all", "RAGGED": tokens == "packed"}
            constants = _shape(d, dtype, arch) | slots | _blocks(configs.bias)
            yield _case(
                rel_attention_bwd_bias_kernel, f"d={d} {tokens} {dtype}", constants, d, dtype, configs.bias
            )
    yield from _small_cases(arch)


def _small_cases(arch: str) -> Iterator[Case]:
    """The kernels that know no head size."""
    launch = LaunchConfig(block_m=32, block_n=64, num_warps=4, num_stages=2)
    for slots, dtype in product((False, True), DTYPES):
        constants = {"Q_SLOTS": slots, "K_SLOTS": slots, "G": GRID, "BLOCK_M": 32, "BLOCK_N": 64}
        label = f"{'kept' if slots else 'all'} {dtype}"
        yield _case(rel_attention_bwd_gather_kernel, label, constants, 64, dtype, launch)
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
    kernel: Any, label: str, constants: dict[str, Any], head_dim: int, dtype: str, launch: LaunchConfig
) -> Case:
    op = kernel.__name__.removesuffix("_kernel")
    dtypes = {name: _dtype(name, dtype) for name in kernel.arg_names if name not in constants}
    # Rows of a head are a multiple of 16 numbers apart in all published models; heads are not at 72.
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
        entry=entry(op, head_dim, dtype == "bf16") if op in KERNELS.values() else None,
    )


def _dtype(name: str, dtype: str) -> str:
    if name in ("q_pos_ptr", "k_pos_ptr", "pos_ptr"):
        return "*i64"
    if name.endswith(("offsets_ptr", "slots_ptr", "missing_ptr")):
        return "*i32"
    if name in ("lse_ptr", "delta_ptr", "bias_ptr", "dbias_ptr", "table_ptr", "dtable_ptr"):
        return "*fp32"
    if name.endswith("_ptr"):
        return f"*{dtype}"
    return "fp32" if name == "scale" else "i32"
