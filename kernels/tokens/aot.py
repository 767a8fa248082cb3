"""The kernels at the widths of the published models (S, B, L, XL), for compiling without a GPU."""

from collections.abc import Iterator
from itertools import product

from ..aot import Case
from .config import launch_config
from .kernel import unmask_tokens_bwd_kernel, unmask_tokens_fwd_kernel

WIDTHS = (384, 768, 1024, 1152)


def cases() -> Iterator[Case]:
    """Forward and backward; bfloat16 at every width, float32 at the widest."""
    types = [*product(WIDTHS, ("bf16",)), (max(WIDTHS), "fp32")]
    for kernel, (D, dtype) in product((unmask_tokens_fwd_kernel, unmask_tokens_bwd_kernel), types):
        config = launch_config(D, 32, 256)
        dtypes = {name: _dtype(name, dtype) for name in kernel.arg_names if name != "BLOCK_D"}
        yield Case(
            kernel=kernel,
            label=f"D={D} {dtype}",
            dtypes=dtypes,
            constants={"BLOCK_D": config.block_d},
            aligned=frozenset(name for name in dtypes if name.endswith("_ptr") or name == "D"),
            num_warps=config.num_warps,
        )


def _dtype(name: str, dtype: str) -> str:
    if name == "restore_ptr":
        return "*i64"
    if name in ("dmask_ptr", "dpos_ptr"):
        return "*fp32"
    return f"*{dtype}" if name.endswith("_ptr") else "i32"
