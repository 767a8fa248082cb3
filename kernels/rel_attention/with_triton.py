"""Attention by the Triton kernels of this package."""

import torch.nn.functional as F
from torch import Tensor

from ..backends import uses_triton
from ..checks import plain_only
from .call import Call
from .config import EIGHT, MAX_HEAD_DIM
from .registered import rel_attention_fwd, rel_attention_qkvpacked_fwd


def refusal(q: Tensor, table_RH: Tensor | None, call: Call, needs_grad: bool) -> str | None:
    if plain_only():
        return "transforms of torch.func, forward-mode derivatives and torch.export do not see into it"
    if not uses_triton(q):
        dtypes = "float32, float16 or bfloat16"
        return f"it needs a CUDA device, Triton and {dtypes}; got {q.dtype} on {q.device}"
    if q.shape[-1] > MAX_HEAD_DIM:
        return f"head size {q.shape[-1]}, it takes at most {MAX_HEAD_DIM}"
    return None


def attend(q: Tensor, k: Tensor, v: Tensor, table_RH: Tensor | None, call: Call) -> Tensor:
    """q [B, H, M, d] (or [R, H, d]), k and v [B, H, N, d] (or [R, H, d]) -> like q."""
    if _too_narrow(q):
        out = attend(_widened(q), _widened(k), _widened(v), table_RH, call)
        return out[..., : q.shape[-1]]
    heads_first = (x.transpose(0, 1)[None] for x in (q, k, v)) if call.ragged else (q, k, v)
    queries, keys = call.queries, call.keys
    out = rel_attention_fwd(
        *heads_first, table_RH, queries.pos, keys.pos, queries.offsets, keys.offsets,
        queries.length, keys.length, call.grid_size, call.scale, call.bias_form, call.table_grad,
    )[0]  # fmt: skip
    return out.squeeze(0) if call.ragged else out.transpose(1, 2)


def attend_packed(qkv: Tensor, table_RH: Tensor | None, call: Call) -> Tensor:
    """qkv [B, L, 3, H, d] (or [R, 3, H, d]) -> [B, L, H, d] (or [R, H, d])."""
    if _too_narrow(qkv):
        return attend_packed(_widened(qkv), table_RH, call)[..., : qkv.shape[-1]]
    side = call.queries
    out = rel_attention_qkvpacked_fwd(
        qkv[None] if call.ragged else qkv, table_RH, side.pos, side.offsets, side.length,
        call.grid_size, call.scale, call.bias_form, call.table_grad,
    )[0]  # fmt: skip
    return out.squeeze(0) if call.ragged else out


def _too_narrow(x: Tensor) -> bool:
    """Whether rows of half types cannot all begin at multiples of 16 bytes (see ``launch.aligned``)."""
    return uses_triton(x) and x.element_size() == 2 and x.shape[-1] % EIGHT != 0


def _widened(x: Tensor) -> Tensor:
    """``x`` padded with zeros to the next head size that is a multiple of 8; the zeros change no score."""
    return F.pad(x, (0, -x.shape[-1] % EIGHT))
