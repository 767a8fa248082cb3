"""Attention by the Triton kernels of this room."""

from torch import Tensor

from ..backends import uses_triton
from .call import Call
from .config import MAX_HEAD_DIM
from .registered import rel_attention_fwd, rel_attention_qkvpacked_fwd


def refusal(q: Tensor, table_RH: Tensor | None, call: Call, needs_grad: bool) -> str | None:
    if not uses_triton(q):
        dtypes = "float32, float16 or bfloat16"
        return f"it needs a CUDA device, Triton and {dtypes}; got {q.dtype} on {q.device}"
    if q.shape[-1] > MAX_HEAD_DIM:
        return f"head size {q.shape[-1]}, it takes at most {MAX_HEAD_DIM}"
    return None


def attend(q: Tensor, k: Tensor, v: Tensor, table_RH: Tensor | None, call: Call) -> Tensor:
    heads_first = (x.transpose(0, 1)[None] for x in (q, k, v)) if call.ragged else (q, k, v)
    queries, keys = call.queries, call.keys
    out = rel_attention_fwd(
        *heads_first, table_RH, queries.pos, keys.pos, queries.offsets, keys.offsets,
        queries.length, keys.length, call.grid_size, call.scale, call.bias_form, call.table_grad,
    )[0]  # fmt: skip
    return out[0] if call.ragged else out.transpose(1, 2)


def attend_packed(qkv: Tensor, table_RH: Tensor | None, call: Call) -> Tensor:
    """qkv [B, L, 3, H, d] (or [R, 3, H, d]) -> [B, L, H, d] (or [R, H, d])."""
    side = call.queries
    out = rel_attention_qkvpacked_fwd(
        qkv[None] if call.ragged else qkv, table_RH, side.pos, side.offsets, side.length,
        call.grid_size, call.scale, call.bias_form, call.table_grad,
    )[0]  # fmt: skip
    return out[0] if call.ragged else out
