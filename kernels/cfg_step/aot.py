"""The kernel at the published models' latents (4 x 32 x 32), for compiling without a GPU."""

from collections.abc import Iterator
from itertools import product

from ..aot import Case
from .config import launch_config
from .kernel import cfg_step_kernel


def cases(arch: str) -> Iterator[Case]:
    """DDPM and DDIM, with guidance and without; the model's output in bfloat16 and in float32."""
    del arch  # one choice for all
    config = launch_config(4 * 32 * 32)
    for kind, guided, dtype in product(("ddpm", "ddim"), (True, False), ("bf16", "fp32")):
        constants = {
            "GUIDED": guided, "KIND": ("ddpm", "ddim").index(kind), "START_X": False, "LEARNED": True,
            "NOISE": True, "CLIP": False, "BLOCK": config.block,
        }  # fmt: skip
        dtypes = {name: _dtype(name, dtype) for name in cfg_step_kernel.arg_names if name not in constants}
        yield Case(
            kernel=cfg_step_kernel,
            label=f"{kind}{' guided' if guided else ''} {dtype}",
            dtypes=dtypes,
            constants=constants,
            aligned=frozenset(
                name for name in dtypes if name.endswith("_ptr") or name in ("N", "width", "guided")
            ),
            num_warps=config.num_warps,
        )


def _dtype(name: str, dtype: str) -> str:
    if name == "output_ptr":
        return f"*{dtype}"
    return "*fp32" if name.endswith("_ptr") else "i32"
