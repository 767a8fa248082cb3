"""The kernel at the published models' latents (4 x 32 x 32), to compile without a GPU."""

from collections.abc import Iterator
from itertools import product

from ..aot import Case
from ..launches import columns, shape_class, tuned_for
from .config import launch_config
from .kernel import cfg_step_kernel


def cases(arch: str) -> Iterator[Case]:
    """DDPM and DDIM, with guidance (both halves or one) and without; model output in bfloat16 and float32."""
    numbers = 4 * 32 * 32
    how = {"": (False, True), " guided": (True, True), " guided, one half": (True, False)}
    for kind, name, dtype in product(("ddpm", "ddim"), how, ("bf16", "fp32")):
        guided, both = how[name]
        entry = "cfg_step", shape_class(columns(numbers), dtype == "bf16")
        config = launch_config(numbers, **tuned_for(entry, arch))
        constants = {
            "GUIDED": guided, "BOTH": both, "KIND": ("ddpm", "ddim").index(kind), "START_X": False,
            "LEARNED": True, "NOISE": True, "CLIP": False, "BLOCK": config.block,
        }  # fmt: skip
        dtypes = {arg: _dtype(arg, dtype) for arg in cfg_step_kernel.arg_names if arg not in constants}
        yield Case(
            kernel=cfg_step_kernel,
            label=f"{kind}{name} {dtype}",
            dtypes=dtypes,
            constants=constants,
            aligned=frozenset(
                arg for arg in dtypes if arg.endswith("_ptr") or arg in ("N", "width", "guided")
            ),
            num_warps=config.num_warps,
            entry=entry,
        )


def _dtype(name: str, dtype: str) -> str:
    if name == "output_ptr":
        return f"*{dtype}"
    return "*fp32" if name.endswith("_ptr") else "i32"
