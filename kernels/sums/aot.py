"""The kernel at the widths of the published models (S, B, L, XL), for compiling without a GPU."""

from collections.abc import Iterator
from itertools import product

from ..aot import Case
from ..launches import shape_class, tuned_for
from .config import ANY, launch_config
from .kernel import sum_chunks_kernel

COLUMNS = (384, 768, 1024, 1152, 3456, 4608)


def cases(arch: str) -> Iterator[Case]:
    """Rows in bfloat16 at every width; partial sums, in float32, at the widest."""
    for D, dtype in [*product(COLUMNS, ("bf16",)), (max(COLUMNS), "fp32")]:
        entry = "sum_chunks", shape_class(ANY, dtype == "bf16")
        config = launch_config(64 * 205, D, **tuned_for(entry, arch))
        pointers = dict.fromkeys(("first_ptr", "second_ptr", "third_ptr"), "*fp32")
        yield Case(
            kernel=sum_chunks_kernel,
            label=f"D={D} {dtype}",
            dtypes={"x_ptr": f"*{dtype}", **pointers, "R": "i32", "P": "i32", "D": "i32"},
            constants={"BLOCK_P": config.block_p, "BLOCK_D": config.block_d, "STAGES": config.num_stages},
            aligned=frozenset({"x_ptr", *pointers, "D"}),
            num_warps=config.num_warps,
            entry=entry,
        )
