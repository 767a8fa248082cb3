"""Which library computes attention. B samples, H heads, M queries, N keys, d head size, R rows in all."""

from dataclasses import dataclass

from torch import Tensor

from ..backends import uses_triton
from . import reference
from .config import MAX_HEAD_DIM

ATTENTION_BACKENDS = ("auto", "triton", "sdpa", "flex", "xformers", "flash_attn")


@dataclass(frozen=True, kw_only=True)
class Side:
    """Where queries or keys stand: ``pos`` [B, length] or [R], or None for the whole grid in order; with
    ``offsets`` (int32 [B + 1]) samples differ in length, and the longest has ``length`` tokens at most."""

    pos: Tensor | None
    offsets: Tensor | None
    length: int
    batch: int


@dataclass(frozen=True, kw_only=True)
class Call:
    """Everything about one call but the tensors that carry gradients."""

    queries: Side
    keys: Side
    grid_size: int
    scale: float
    bias_form: str = "lookup"
    table_grad: str = "recompute"

    @property
    def ragged(self) -> bool:
        return self.queries.offsets is not None


def choose(name: str, q: Tensor, table: Tensor | None, call: Call) -> str:
    """The backend that serves this call. ``ValueError`` where the one asked for cannot, with the reason."""
    if name not in ATTENTION_BACKENDS:
        raise ValueError(f"attention_backend: got {name!r}, allowed are {', '.join(ATTENTION_BACKENDS)}")
    if name == "auto":
        if not uses_triton(q):
            return "sdpa"
        name = "triton"
    reason = _refusal(name, q, table, call)
    if reason is not None:
        raise ValueError(f"attention_backend: {name!r} cannot serve this call: {reason}")
    return name


def _refusal(name: str, q: Tensor, table: Tensor | None, call: Call) -> str | None:
    if name == "triton":
        if not uses_triton(q):
            dtypes = "float32, float16 or bfloat16"
            return f"it needs a CUDA device, Triton and {dtypes}; got {q.dtype} on {q.device}"
        if q.shape[-1] > MAX_HEAD_DIM:
            return f"head size {q.shape[-1]}, it takes at most {MAX_HEAD_DIM}"
    return None


def attend(name: str, q: Tensor, k: Tensor, v: Tensor, table_RH: Tensor | None, call: Call) -> Tensor:
    """q [B, H, M, d] (or [R, H, d]) -> like q."""
    if name == "sdpa":
        return reference.rel_attention(q, k, v, table_RH, call)
    from .triton_op import rel_attention_fwd

    ragged = call.ragged
    heads_first = (x.transpose(0, 1)[None] for x in (q, k, v)) if ragged else (q, k, v)
    queries, keys = call.queries, call.keys
    out = rel_attention_fwd(
        *heads_first, table_RH, queries.pos, keys.pos, queries.offsets, keys.offsets,
        queries.length, keys.length, call.grid_size, call.scale, call.bias_form, call.table_grad,
    )[0]  # fmt: skip
    return out[0] if ragged else out.transpose(1, 2)


def attend_packed(name: str, qkv: Tensor, table_RH: Tensor | None, call: Call) -> Tensor:
    """qkv [B, L, 3, H, d] (or [R, 3, H, d]) -> [B, L, H, d] (or [R, H, d])."""
    if name != "triton":
        q, k, v = qkv.unbind(-3)
        if call.ragged:
            return attend(name, q, k, v, table_RH, call)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return attend(name, q, k, v, table_RH, call).transpose(1, 2)
    from .triton_op import rel_attention_qkvpacked_fwd

    side = call.queries
    out = rel_attention_qkvpacked_fwd(
        qkv[None] if call.ragged else qkv, table_RH, side.pos, side.offsets, side.length,
        call.grid_size, call.scale, call.bias_form, call.table_grad,
    )[0]  # fmt: skip
    return out[0] if call.ragged else out
