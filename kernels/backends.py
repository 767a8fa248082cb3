"""Which implementation serves each op on this machine, and why.

Ops with a Triton kernel run it on CUDA (float32, float16, bfloat16), and under ``TRITON_INTERPRET=1`` in
Triton's interpreter (for tests). Ops of ``csrc/`` run on the devices for which it was built. Everything else
runs the plain PyTorch of the package's ``reference.py``.
"""

import importlib
import importlib.util
import os
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .checks import plain_only
from .native import MISSING, vector_bits

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
HAS_TRITON = importlib.util.find_spec("triton") is not None
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
"""The dtypes of the Triton kernels. They compute in float32, so float64 goes to PyTorch."""

WITH_TRITON = (
    "ln_modulate",
    "gate_residual_ln_modulate",
    "gate_residual",
    "ln_modulate_linear",
    "gate_residual_ln_modulate_linear",
    "residual_ln_modulate_linear",
    "bias_gelu",
    "gelu_linear",
    "sum_rows",
    "gather_tokens",
    "unmask_tokens",
    "merge_tokens",
    "patch_embed",
    "rel_attention",
    "rel_attention_qkvpacked",
    "cfg_step",
    "quantize_rows",
    "quantize_weight",
)

IN_FLOAT8 = ("quantize_rows", "quantize_weight")
"""Those that write float8, which not every GPU supports."""

WITH_CPP = {
    "ln_modulate": 0,
    "gate_residual_ln_modulate": 0,
    "gate_residual": 0,
    "ln_modulate_linear": 0,
    "gate_residual_ln_modulate_linear": 0,
    "residual_ln_modulate_linear": 0,
    "bias_gelu": 0,
    "gelu_linear": 0,
    "rel_attention": 256,
    "rel_attention_qkvpacked": 256,
}
"""Those that ``csrc/`` serves on a CPU, with the narrowest vectors (in bits) for which it does. With narrower
ones, attention's products are slower than PyTorch's."""

NATIVE = ("mask_plan", "grad_sumsq", "adan_step", "adamw_step")

OPS = (
    *WITH_TRITON,
    *NATIVE,
    "linear",
    "skip_linear",
    "patch_skip_linear",
)


@dataclass(frozen=True)
class Backend:
    """One op's implementation: ``op`` is its public name, ``backend`` what serves it, and ``reason`` why."""

    op: str
    backend: str
    reason: str


def backends() -> list[Backend]:
    """One row per op: what serves it on this machine by default."""
    return [_backend(op) for op in OPS]


def tf32() -> bool:
    """Whether PyTorch may use TF32 for float32 products on NVIDIA GPUs that have it
    (``torch.set_float32_matmul_precision("high")``, ``torch.backends.cuda.matmul.allow_tf32``)."""
    return torch.version.hip is None and torch.backends.cuda.matmul.fp32_precision == "tf32"


def on_triton(x: Tensor) -> bool:
    """Whether a registered op with a Triton kernel runs that kernel when it is called on ``x``."""
    here = INTERPRETING or (x.is_cuda and HAS_TRITON)
    return here and x.dtype in DTYPES


def uses_triton(x: Tensor) -> bool:
    """Whether to call such an op on ``x``: not if only plain PyTorch may be used."""
    return on_triton(x) and not plain_only()


@cache
def launching(room: str) -> Any:
    """The module that launches a room's Triton kernels, by the name of the room's package.

    It is imported on first use, because not every machine has Triton.
    """
    return importlib.import_module(f"{room}.launch")


def uses_csrc(*tensors: Tensor | None) -> bool:
    """Whether an op with a C++ kernel for the CPU runs it on these tensors."""
    if MISSING["cpu"] is not None or INTERPRETING or plain_only():
        return False
    for x in tensors:  # noqa: SIM110 - a generator takes half a microsecond more
        if x is not None and not (x.is_cpu and x.dtype in DTYPES):
            return False
    return True


def _native(op: str) -> Backend:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if MISSING[device] is None:
        return Backend(op, "csrc", f"{device.upper()} op, built with the package")
    rest = "" if device == "cpu" or MISSING["cpu"] is not None else "; on the CPU the C++ op serves"
    return Backend(op, "pytorch", f"PyTorch reference: the {device.upper()} op is {MISSING[device]}{rest}")


def _backend(op: str) -> Backend:
    if op in NATIVE:
        return _native(op)
    plain = "PyTorch reference"
    if op.startswith("rel_attention"):
        plain = "scaled_dot_product_attention with the bias as its mask"
    if op not in WITH_TRITON:
        return Backend(
            op, "pytorch", f"{plain}: serves every device; this version has no kernel of its own for it"
        )
    if INTERPRETING:
        return Backend(op, "triton", "TRITON_INTERPRET=1: the kernel runs in Triton's interpreter, slowly")
    if not torch.cuda.is_available():
        if op in WITH_CPP and MISSING["cpu"] is None and (bits := vector_bits()) >= WITH_CPP[op]:
            vectors = f" in vectors of {bits} bits" if bits else ""
            return Backend(op, "csrc", f"no CUDA device, where the Triton kernel would serve; C++{vectors}")
        return Backend(op, "pytorch", f"{plain}: no CUDA device, where the Triton kernel would serve")
    if not HAS_TRITON:
        return Backend(op, "pytorch", f"{plain}: triton is not installed (pip install triton)")
    if op in IN_FLOAT8:
        from .float8.registered import multiplies

        if not multiplies(torch.device("cuda", torch.cuda.current_device())):
            return Backend(op, "pytorch", f"{plain}: this GPU has no products in float8 that PyTorch serves")
    from .launcher import KNOWN, VERSIONS

    known = f"; its own launches are slower than ours, for Triton {' and '.join(VERSIONS)} on NVIDIA GPUs"
    return Backend(op, "triton", f"CUDA device and triton are there{'' if KNOWN else known}")
