"""The kernel at the widths of the published models (S, B, L, XL), to compile without a GPU."""

from collections.abc import Iterator
from itertools import product

from ..aot import Case
from ..launches import shape_class, tuned_for
from .config import ANY, CHUNKS, launch_config
from .kernel import sum_chunks_kernel

COLUMNS = (384, 768, 1024, 1152, 3456, 4608)


def cases(arch: str) -> Iterator[Case]:
    """bfloat16 rows at every width; float32 partial sums at the widest, also in narrow blocks."""
    types = [*product(COLUMNS, ("bf16",)), (max(COLUMNS), "fp32")]
    for D, dtype, narrow in [*((D, dtype, False) for D, dtype in types), (max(COLUMNS), "fp32", True)]:
        entry = None if narrow else ("sum_chunks", shape_class(ANY, dtype == "bf16"))
        choice = CHUNKS if entry is None else tuned_for(entry, arch)
        config = launch_config(64 * 205, D, **choice)
        pointers = dict.fromkeys(("first_ptr", "second_ptr", "third_ptr"), "*fp32")
        yield Case(
            kernel=sum_chunks_kernel,
            label=f"D={D} {'chunks ' if narrow else ''}{dtype}",
            dtypes={"x_ptr": f"*{dtype}", **pointers, "R": "i32", "P": "i32", "D": "i32"},
            constants={"BLOCK_P": config.block_p, "BLOCK_D": config.block_d, "STAGES": config.num_stages},
            aligned=frozenset({"x_ptr", *pointers, "D"}),
            num_warps=config.num_warps,
            entry=entry,
        )
