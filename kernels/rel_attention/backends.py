"""The libraries that compute attention. Each has a module with what it refuses and how it is called."""

from collections.abc import Callable

import torch
from torch import Tensor

from ..backends import Backend, uses_triton
from . import with_flash_attn, with_flex, with_samples, with_sdpa, with_triton, with_xformers
from .call import Call

Refusal = Callable[[Tensor, Tensor | None, Call, bool], str | None]
Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None, Call], Tensor]

LIBRARIES: dict[str, tuple[Refusal, Attend]] = {
    "triton": (with_triton.refusal, with_triton.attend),
    "samples": (with_samples.refusal, with_samples.attend),
    "sdpa": (with_sdpa.refusal, with_sdpa.attend),
    "flex": (with_flex.refusal, with_flex.attend),
    "xformers": (with_xformers.refusal, with_xformers.attend),
    "flash_attn": (with_flash_attn.refusal, with_flash_attn.attend),
}
ATTENTION_BACKENDS = ("auto", *LIBRARIES)


def choose(name: str, q: Tensor, table_RH: Tensor | None, call: Call, needs_grad: bool) -> str:
    """The backend that serves this call; ``ValueError`` with the reason if the requested one cannot."""
    if name not in ATTENTION_BACKENDS:
        raise ValueError(f"attention_backend: got {name!r}, expected {', '.join(ATTENTION_BACKENDS)}")
    if name == "auto" and uses_triton(q):
        name = "triton"
    elif name == "auto":
        name = "samples" if with_samples.better(q, table_RH, call, needs_grad) else "sdpa"
    reason = LIBRARIES[name][0](q, table_RH, call, needs_grad)
    if reason is not None:
        raise ValueError(f"attention_backend: {name!r} cannot serve this call: {reason}")
    return name


def attend(name: str, q: Tensor, k: Tensor, v: Tensor, table_RH: Tensor | None, call: Call) -> Tensor:
    """q [B, H, M, d] (or [R, H, d]) -> like q."""
    return LIBRARIES[name][1](q, k, v, table_RH, call)


def attend_packed(name: str, qkv: Tensor, table_RH: Tensor | None, call: Call) -> Tensor:
    """qkv [B, L, 3, H, d] (or [R, 3, H, d]) -> [B, L, H, d] (or [R, H, d])."""
    if name in ("triton", "samples"):
        return with_triton.attend_packed(qkv, table_RH, call)
    q, k, v = qkv.unbind(-3)
    if call.ragged:
        return attend(name, q, k, v, table_RH, call)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return attend(name, q, k, v, table_RH, call).transpose(1, 2)


def attention_backends() -> list[Backend]:
    """One row per library: its version, or whether it is here; what it serves and what it does not."""
    triton = uses_triton(torch.empty(0, device="cuda" if torch.cuda.is_available() else "cpu"))
    rows = {
        "triton": ("here" if triton else None, "all of it, deterministic; CUDA, head sizes up to 128"),
        "samples": ("here", "the CPU; one sample after the other: no table of all scores; deterministic"),
        "sdpa": (with_sdpa.installed(), "all of it, on every device; spells the bias out; never cuDNN; on "
                 "CUDA the table's gradient by atomics, not deterministic"),
        "flex": (with_sdpa.installed(), "no samples of different lengths; on a CPU no gradients; on CUDA "
                 "head sizes from 16, the table's gradient by atomics, not deterministic"),
        "xformers": (with_xformers.installed(), "CUDA, with a bias up to compute capability 9.0; spells the "
                     "bias out; no samples of different lengths"),
        "flash_attn": (with_flash_attn.installed(), "CUDA, half types: 2 and 3 models without a bias table "
                       "(DiT), 4 the forward pass with one on Hopper and Blackwell; no training with one"),
    }  # fmt: skip
    return [Backend(name, found or "not here", serves) for name, (found, serves) in rows.items()]
