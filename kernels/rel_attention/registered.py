"""The kernels as registered ops: Triton's, or those of ``samples.py`` on a CPU.

B samples, H heads, M queries, N keys, L tokens, d head size, R table rows. With offsets, the samples are
packed in a batch of one. Outputs are [B, M, H, d] in memory, as the projection after attention reads them.
"""

from typing import Any

import torch
from torch import Tensor

from ..backends import launching, on_triton
from ..registry import registered
from . import samples
from .call import Call, Side


@registered("mdt_fast::rel_attention")
def rel_attention_fwd(
    q_BHMd: Tensor,
    k_BHNd: Tensor,
    v_BHNd: Tensor,
    table_RH: Tensor | None,
    q_pos: Tensor | None,
    k_pos: Tensor | None,
    q_offsets: Tensor | None,
    k_offsets: Tensor | None,
    max_q: int,
    max_k: int,
    grid_size: int,
    scale: float,
    bias_form: str,
    table_grad: str,
) -> tuple[Tensor, Tensor]:
    """Output [B, M, H, d], and log(sum(exp(score))) [H, B * M] in float32 (float64 for float64)."""
    call = Call(
        queries=_side(q_BHMd, q_pos, q_offsets, max_q), keys=_side(k_BHNd, k_pos, k_offsets, max_k),
        grid_size=grid_size, scale=scale, bias_form=bias_form, table_grad=table_grad,
    )  # fmt: skip
    out_BMHd = _rows_first(q_BHMd)
    return out_BMHd, _kernels(q_BHMd).forward(
        q_BHMd, k_BHNd, v_BHNd, table_RH, call, out_BMHd.transpose(1, 2)
    )


@registered("mdt_fast::rel_attention_bwd")
def rel_attention_bwd(
    dout_BMHd: Tensor,
    q_BHMd: Tensor,
    k_BHNd: Tensor,
    v_BHNd: Tensor,
    table_RH: Tensor | None,
    q_pos: Tensor | None,
    k_pos: Tensor | None,
    q_offsets: Tensor | None,
    k_offsets: Tensor | None,
    out_BMHd: Tensor,
    lse: Tensor,
    max_q: int,
    max_k: int,
    grid_size: int,
    scale: float,
    bias_form: str,
    table_grad: str,
    needs_table: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q [B, M, H, d], k and v [B, N, H, d], and the table (empty if not needed)."""
    call = Call(
        queries=_side(q_BHMd, q_pos, q_offsets, max_q), keys=_side(k_BHNd, k_pos, k_offsets, max_k),
        grid_size=grid_size, scale=scale, bias_form=bias_form, table_grad=table_grad,
    )  # fmt: skip
    dq, dk, dv = (_rows_first(x) for x in (q_BHMd, k_BHNd, v_BHNd))
    dtable = _table_gradient(q_BHMd, table_RH if needs_table else None)
    _kernels(q_BHMd).backward(
        dout_BMHd.transpose(1, 2), q_BHMd, k_BHNd, v_BHNd, table_RH, out_BMHd.transpose(1, 2), lse, call,
        dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2), dtable.zero_() if needs_table else None,
    )  # fmt: skip
    return dq, dk, dv, dtable


@registered("mdt_fast::rel_attention_qkvpacked")
def rel_attention_qkvpacked_fwd(
    qkv_BL3Hd: Tensor,
    table_RH: Tensor | None,
    pos: Tensor | None,
    offsets: Tensor | None,
    max_length: int,
    grid_size: int,
    scale: float,
    bias_form: str,
    table_grad: str,
) -> tuple[Tensor, Tensor]:
    """As ``rel_attention_fwd``, for queries, keys and values of the same tokens in one tensor."""
    call = _packed_call(qkv_BL3Hd, pos, offsets, max_length, grid_size, scale, bias_form, table_grad)
    q, k, v = _unpack(qkv_BL3Hd)
    out_BLHd = _rows_first(q)
    return out_BLHd, _kernels(q).forward(q, k, v, table_RH, call, out_BLHd.transpose(1, 2))


@registered("mdt_fast::rel_attention_qkvpacked_bwd")
def rel_attention_qkvpacked_bwd(
    dout_BLHd: Tensor,
    qkv_BL3Hd: Tensor,
    table_RH: Tensor | None,
    pos: Tensor | None,
    offsets: Tensor | None,
    out_BLHd: Tensor,
    lse: Tensor,
    max_length: int,
    grid_size: int,
    scale: float,
    bias_form: str,
    table_grad: str,
    needs_table: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of qkv, written as one tensor [B, L, 3, H, d], and of the table (empty if not needed)."""
    call = _packed_call(qkv_BL3Hd, pos, offsets, max_length, grid_size, scale, bias_form, table_grad)
    q, k, v = _unpack(qkv_BL3Hd)
    dqkv_BL3Hd = qkv_BL3Hd.new_empty(qkv_BL3Hd.shape)
    dtable = _table_gradient(q, table_RH if needs_table else None)
    _kernels(q).backward(
        dout_BLHd.transpose(1, 2), q, k, v, table_RH, out_BLHd.transpose(1, 2), lse, call,
        *_unpack(dqkv_BL3Hd), dtable.zero_() if needs_table else None,
    )  # fmt: skip
    return dqkv_BL3Hd, dtable


def _kernels(q: Tensor) -> Any:
    if not on_triton(q):
        return samples
    return launching(__package__)


def _side(x_BHRd: Tensor, pos: Tensor | None, offsets: Tensor | None, longest: int) -> Side:
    batch = x_BHRd.shape[0] if offsets is None else len(offsets) - 1
    return Side(pos=pos, offsets=offsets, length=longest, batch=batch)


def _packed_call(
    qkv_BL3Hd: Tensor,
    pos: Tensor | None,
    offsets: Tensor | None,
    max_length: int,
    grid_size: int,
    scale: float,
    bias_form: str,
    table_grad: str,
) -> Call:
    side = _side(qkv_BL3Hd, pos, offsets, max_length)
    return Call(
        queries=side, keys=side, grid_size=grid_size, scale=scale, bias_form=bias_form, table_grad=table_grad
    )


def _unpack(qkv_BL3Hd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = qkv_BL3Hd.permute(2, 0, 3, 1, 4).unbind()
    return q, k, v


def _rows_first(x_BHRd: Tensor) -> Tensor:
    B, H, R, d = x_BHRd.shape
    return x_BHRd.new_empty(B, R, H, d)


def _table_gradient(x: Tensor, table_RH: Tensor | None) -> Tensor:
    return x.new_empty(0) if table_RH is None else table_RH.new_empty(table_RH.shape)


def _fake_lse(q_BHMd: Tensor) -> Tensor:
    B, H, M, _ = q_BHMd.shape
    wide = torch.float64 if q_BHMd.dtype == torch.float64 else torch.float32
    return q_BHMd.new_empty(H, B * M, dtype=wide)


@rel_attention_fwd.register_fake
def _(q_BHMd, k_BHNd, v_BHNd, table_RH, *_):  # type: ignore[no-untyped-def]
    return _rows_first(q_BHMd), _fake_lse(q_BHMd)


@rel_attention_bwd.register_fake
def _(dout_BMHd, q_BHMd, k_BHNd, v_BHNd, table_RH, *rest):  # type: ignore[no-untyped-def]
    gradients = (_rows_first(x) for x in (q_BHMd, k_BHNd, v_BHNd))
    return *gradients, _table_gradient(q_BHMd, table_RH if rest[-1] else None)


@rel_attention_qkvpacked_fwd.register_fake
def _(qkv_BL3Hd, table_RH, *_):  # type: ignore[no-untyped-def]
    q = _unpack(qkv_BL3Hd)[0]
    return _rows_first(q), _fake_lse(q)


@rel_attention_qkvpacked_bwd.register_fake
def _(dout_BLHd, qkv_BL3Hd, table_RH, *rest):  # type: ignore[no-untyped-def]
    return qkv_BL3Hd.new_empty(qkv_BL3Hd.shape), _table_gradient(qkv_BL3Hd, table_RH if rest[-1] else None)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    tensors, ctx.settings = inputs[:8], inputs[8:]
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # no zeros for a gradient that is missing


def _backward(ctx, dout_BMHd, _dlse):  # type: ignore[no-untyped-def]
    if dout_BMHd is None:
        return (None,) * 14
    needs_table = ctx.needs_input_grad[3]
    gradients = rel_attention_bwd(dout_BMHd.contiguous(), *ctx.saved_tensors, *ctx.settings, needs_table)
    dq, dk, dv = (x.transpose(1, 2) for x in gradients[:3])
    return dq, dk, dv, gradients[3] if needs_table else None, *(None,) * 10


def _setup_context_packed(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    tensors, ctx.settings = inputs[:4], inputs[4:]
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # no zeros for a gradient that is missing


def _backward_packed(ctx, dout_BLHd, _dlse):  # type: ignore[no-untyped-def]
    if dout_BLHd is None:
        return (None,) * 9
    needs_table = ctx.needs_input_grad[1]
    dqkv, dtable = rel_attention_qkvpacked_bwd(
        dout_BLHd.contiguous(), *ctx.saved_tensors, *ctx.settings, needs_table
    )
    return dqkv, dtable if needs_table else None, *(None,) * 7


rel_attention_fwd.register_autograd(_backward, setup_context=_setup_context)
rel_attention_qkvpacked_fwd.register_autograd(_backward_packed, setup_context=_setup_context_packed)
