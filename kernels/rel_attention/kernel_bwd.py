"""Triton kernels: gradients of q, k and v. Names and layouts are as in ``kernel.py``; scores are recomputed.

With P = exp(score - lse), dO the gradient of the output and delta = rowsum(dO * out):
dS = P * (dO V^T - delta), dQ = scale dS K, dK = scale dS^T Q, dV = P^T dO. Each program owns what it
writes, so there are no atomics. If dS is stored for the table's gradient, ``kernel_table.py`` computes dQ
from it where ``config.gathers_queries`` allows.
"""

import triton
import triton.language as tl

from .kernel import (
    LOG2E,
    _bias,
    _dot,
    _each,
    _head,
    _key_term,
    _load,
    _position,
    _query_term,
    _sample,
    _store,
)  # fmt: skip


@triton.jit
def rel_attention_bwd_q_kernel(
    q_ptr, k_ptr, v_ptr, bias_ptr, q_pos_ptr, k_pos_ptr, q_offsets_ptr, k_offsets_ptr, out_ptr, dout_ptr,
    lse_ptr, delta_ptr, dq_ptr,
    H, M, N, rows, n_blocks, bias_size, scale,
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_ob, stride_oh, stride_om, stride_dqb, stride_dqh, stride_dqm,
    BIAS: tl.constexpr, Q_POSITIONS: tl.constexpr, K_POSITIONS: tl.constexpr, RAGGED: tl.constexpr,
    G: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, ALIGN: tl.constexpr,
    PRECISION: tl.constexpr, DIRECT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dQ and delta of one block of queries of one head."""
    pid = tl.program_id(0)
    i_m, i_h, i_b = pid % n_blocks, pid // n_blocks % H, (pid // n_blocks // H).to(tl.int64)
    q_row, M = _sample(q_offsets_ptr, i_b, M, RAGGED)
    k_row, N = _sample(k_offsets_ptr, i_b, N, RAGGED)
    if i_m * BLOCK_M >= M:
        return
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    m_m = o_m < M
    o_d0 = tl.arange(0, D0)
    o_d1 = D0 + tl.arange(0, D1 if D1 else 1)
    q_ptr += _head(i_b, i_h, q_row, stride_qb, stride_qh, stride_qm, RAGGED, ALIGN)
    k_ptr += _head(i_b, i_h, k_row, stride_kb, stride_kh, stride_kn, RAGGED, ALIGN)
    v_ptr += _head(i_b, i_h, k_row, stride_vb, stride_vh, stride_vn, RAGGED, ALIGN)
    out_ptr += _head(i_b, i_h, q_row, stride_ob, stride_oh, stride_om, RAGGED, ALIGN)
    dout_ptr += _head(i_b, i_h, q_row, stride_ob, stride_oh, stride_om, RAGGED, ALIGN)
    dq_ptr += _head(i_b, i_h, q_row, stride_dqb, stride_dqh, stride_dqm, RAGGED, ALIGN)
    b_do0 = _load(dout_ptr, o_m, m_m, stride_om, o_d0, D, D0 <= D, ALIGN)
    b_out0 = _load(out_ptr, o_m, m_m, stride_om, o_d0, D, D0 <= D, ALIGN)
    b_delta = tl.sum(b_do0.to(tl.float32) * b_out0.to(tl.float32), 1)
    b_q0 = _load(q_ptr, o_m, m_m, stride_qm, o_d0, D, D0 <= D, ALIGN)
    b_dq0 = tl.zeros([BLOCK_M, D0], dtype=tl.float32)
    if D1:
        b_do1 = _load(dout_ptr, o_m, m_m, stride_om, o_d1, D, D0 + D1 <= D, ALIGN)
        b_out1 = _load(out_ptr, o_m, m_m, stride_om, o_d1, D, D0 + D1 <= D, ALIGN)
        b_delta += tl.sum(b_do1.to(tl.float32) * b_out1.to(tl.float32), 1)
        b_q1 = _load(q_ptr, o_m, m_m, stride_qm, o_d1, D, D0 + D1 <= D, ALIGN)
        b_dq1 = tl.zeros([BLOCK_M, D1], dtype=tl.float32)
    p_row = i_h.to(tl.int64) * rows + q_row + o_m
    tl.store(delta_ptr + p_row, b_delta, mask=m_m)
    b_lse = tl.load(lse_ptr + p_row, mask=m_m, other=0.0) * LOG2E
    if BIAS:
        p_bias = bias_ptr + i_h.to(tl.int64) * bias_size
        q_term = _query_term(_position(q_pos_ptr, q_row, o_m, M, Q_POSITIONS, G, DIRECT), BIAS, G)

    for start in range(0, N, BLOCK_N):
        o_n = start + tl.arange(0, BLOCK_N)
        m_n = o_n < N
        if BIAS:  # loaded first, so it is in flight while the tensor cores work
            k_term = _key_term(_position(k_pos_ptr, k_row, o_n, N, K_POSITIONS, G, DIRECT), BIAS, G)
            b_bias = _bias(p_bias, q_term, k_term, DIRECT)
        b_k0 = _load(k_ptr, o_n, m_n, stride_kn, o_d0, D, D0 <= D, ALIGN)
        b_v0 = _load(v_ptr, o_n, m_n, stride_vn, o_d0, D, D0 <= D, ALIGN)
        b_s = _dot(b_q0, b_k0.trans(), PRECISION)
        b_dp = _dot(b_do0, b_v0.trans(), PRECISION)
        if D1:
            b_k1 = _load(k_ptr, o_n, m_n, stride_kn, o_d1, D, D0 + D1 <= D, ALIGN)
            b_v1 = _load(v_ptr, o_n, m_n, stride_vn, o_d1, D, D0 + D1 <= D, ALIGN)
            b_s += _dot(b_q1, b_k1.trans(), PRECISION)
            b_dp += _dot(b_do1, b_v1.trans(), PRECISION)
        b_s *= scale * LOG2E
        if BIAS:
            b_s += b_bias
        b_p = tl.where(m_n[None, :], tl.exp2(b_s - b_lse[:, None]), 0.0)
        b_ds = b_p * (b_dp - b_delta[:, None])
        b_ds = b_ds.to(k_ptr.dtype.element_ty)
        b_dq0 += _dot(b_ds, b_k0, PRECISION)
        if D1:
            b_dq1 += _dot(b_ds, b_k1, PRECISION)

    _store(dq_ptr, o_m, m_m, stride_dqm, o_d0, b_dq0 * scale, D, D0 <= D, ALIGN)
    if D1:
        _store(dq_ptr, o_m, m_m, stride_dqm, o_d1, b_dq1 * scale, D, D0 + D1 <= D, ALIGN)


@triton.jit
def rel_attention_bwd_kv_kernel(
    q_ptr, k_ptr, v_ptr, bias_ptr, q_pos_ptr, k_pos_ptr, q_offsets_ptr, k_offsets_ptr, dout_ptr,
    lse_ptr, delta_ptr, dk_ptr, dv_ptr, ds_ptr,
    first, H, M, N, rows, n_blocks, bias_size, scale,
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_ob, stride_oh, stride_om, stride_dkb, stride_dkh, stride_dkn, stride_dvb, stride_dvh, stride_dvn,
    stride_dsh, stride_dsn,
    BIAS: tl.constexpr, Q_POSITIONS: tl.constexpr, K_POSITIONS: tl.constexpr, RAGGED: tl.constexpr,
    G: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, ALIGN: tl.constexpr,
    PRECISION: tl.constexpr, DIRECT: tl.constexpr, STORE: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dK and dV of one block of keys of one head, over all queries. Scores are transposed here. STORE also
    writes dS [samples from ``first``, H, N, G*G], with each query's column at its grid position."""
    pid = tl.program_id(0)
    i_n, i_h, i_b = pid % n_blocks, pid // n_blocks % H, (pid // n_blocks // H).to(tl.int64)
    ds_ptr += (i_b * H + i_h) * stride_dsh
    i_b += first
    q_row, M = _sample(q_offsets_ptr, i_b, M, RAGGED)
    k_row, N = _sample(k_offsets_ptr, i_b, N, RAGGED)
    if i_n * BLOCK_N >= N:
        return
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < N
    o_d0 = tl.arange(0, D0)
    o_d1 = D0 + tl.arange(0, D1 if D1 else 1)
    q_ptr += _head(i_b, i_h, q_row, stride_qb, stride_qh, stride_qm, RAGGED, ALIGN)
    k_ptr += _head(i_b, i_h, k_row, stride_kb, stride_kh, stride_kn, RAGGED, ALIGN)
    v_ptr += _head(i_b, i_h, k_row, stride_vb, stride_vh, stride_vn, RAGGED, ALIGN)
    dout_ptr += _head(i_b, i_h, q_row, stride_ob, stride_oh, stride_om, RAGGED, ALIGN)
    dk_ptr += _head(i_b, i_h, k_row, stride_dkb, stride_dkh, stride_dkn, RAGGED, ALIGN)
    dv_ptr += _head(i_b, i_h, k_row, stride_dvb, stride_dvh, stride_dvn, RAGGED, ALIGN)
    b_k0 = _load(k_ptr, o_n, m_n, stride_kn, o_d0, D, D0 <= D, ALIGN)
    b_v0 = _load(v_ptr, o_n, m_n, stride_vn, o_d0, D, D0 <= D, ALIGN)
    b_dk0 = tl.zeros([BLOCK_N, D0], dtype=tl.float32)
    b_dv0 = tl.zeros([BLOCK_N, D0], dtype=tl.float32)
    if D1:
        b_k1 = _load(k_ptr, o_n, m_n, stride_kn, o_d1, D, D0 + D1 <= D, ALIGN)
        b_v1 = _load(v_ptr, o_n, m_n, stride_vn, o_d1, D, D0 + D1 <= D, ALIGN)
        b_dk1 = tl.zeros([BLOCK_N, D1], dtype=tl.float32)
        b_dv1 = tl.zeros([BLOCK_N, D1], dtype=tl.float32)
    if BIAS:
        p_bias = bias_ptr + i_h.to(tl.int64) * bias_size
        k_term = _key_term(_position(k_pos_ptr, k_row, o_n, N, K_POSITIONS, G, DIRECT), BIAS, G)

    for start in range(0, M, BLOCK_M):
        o_m = start + tl.arange(0, BLOCK_M)
        m_m = o_m < M
        p_row = i_h.to(tl.int64) * rows + q_row + tl.minimum(o_m, M - 1)
        b_lse, b_delta = _each(lse_ptr, p_row, DIRECT) * LOG2E, _each(delta_ptr, p_row, DIRECT)
        if BIAS:  # loaded first, so it is in flight while the tensor cores work
            pos_m = _position(q_pos_ptr, q_row, o_m, M, Q_POSITIONS, G, DIRECT)
            q_term = _query_term(pos_m, BIAS, G)
            b_bias = _bias(p_bias, k_term, q_term, DIRECT)
        b_q0 = _load(q_ptr, o_m, m_m, stride_qm, o_d0, D, D0 <= D, ALIGN)
        b_do0 = _load(dout_ptr, o_m, m_m, stride_om, o_d0, D, D0 <= D, ALIGN)
        b_s = _dot(b_k0, b_q0.trans(), PRECISION)
        b_dp = _dot(b_v0, b_do0.trans(), PRECISION)
        if D1:
            b_q1 = _load(q_ptr, o_m, m_m, stride_qm, o_d1, D, D0 + D1 <= D, ALIGN)
            b_do1 = _load(dout_ptr, o_m, m_m, stride_om, o_d1, D, D0 + D1 <= D, ALIGN)
            b_s += _dot(b_k1, b_q1.trans(), PRECISION)
            b_dp += _dot(b_v1, b_do1.trans(), PRECISION)
        b_s *= scale * LOG2E
        if BIAS:
            b_s += b_bias
        b_p = tl.where(m_m[None, :], tl.exp2(b_s - b_lse[None, :]), 0.0)
        b_ds = (b_p * (b_dp - b_delta[None, :])).to(q_ptr.dtype.element_ty)
        if STORE:
            column = pos_m if Q_POSITIONS else o_m
            p_ds = ds_ptr + (o_n[:, None] * stride_dsn + column[None, :])
            tl.store(p_ds, b_ds, mask=m_n[:, None] & m_m[None, :])
        b_p = b_p.to(dout_ptr.dtype.element_ty)
        b_dv0 += _dot(b_p, b_do0, PRECISION)
        b_dk0 += _dot(b_ds, b_q0, PRECISION)
        if D1:
            b_dv1 += _dot(b_p, b_do1, PRECISION)
            b_dk1 += _dot(b_ds, b_q1, PRECISION)

    _store(dk_ptr, o_n, m_n, stride_dkn, o_d0, b_dk0 * scale, D, D0 <= D, ALIGN)
    _store(dv_ptr, o_n, m_n, stride_dvn, o_d0, b_dv0, D, D0 <= D, ALIGN)
    if D1:
        _store(dk_ptr, o_n, m_n, stride_dkn, o_d1, b_dk1 * scale, D, D0 + D1 <= D, ALIGN)
        _store(dv_ptr, o_n, m_n, stride_dvn, o_d1, b_dv1, D, D0 + D1 <= D, ALIGN)


@triton.jit
def rel_attention_bwd_delta_kernel(
    out_ptr, dout_ptr, q_offsets_ptr, delta_ptr,
    H, M, rows, n_blocks, stride_ob, stride_oh, stride_om,
    RAGGED: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    """``delta`` of one block of queries of one head."""
    pid = tl.program_id(0)
    i_m, i_h, i_b = pid % n_blocks, pid // n_blocks % H, (pid // n_blocks // H).to(tl.int64)
    q_row, M = _sample(q_offsets_ptr, i_b, M, RAGGED)
    if i_m * BLOCK_M >= M:
        return
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    m_m = o_m < M
    o_d0 = tl.arange(0, D0)
    head = _head(i_b, i_h, q_row, stride_ob, stride_oh, stride_om, RAGGED, ALIGN)
    b_out = _load(out_ptr + head, o_m, m_m, stride_om, o_d0, D, D0 <= D, ALIGN).to(tl.float32)
    b_delta = tl.sum(b_out * _load(dout_ptr + head, o_m, m_m, stride_om, o_d0, D, D0 <= D, ALIGN), 1)
    if D1:
        o_d1 = D0 + tl.arange(0, D1)
        b_out = _load(out_ptr + head, o_m, m_m, stride_om, o_d1, D, D0 + D1 <= D, ALIGN).to(tl.float32)
        b_delta += tl.sum(
            b_out * _load(dout_ptr + head, o_m, m_m, stride_om, o_d1, D, D0 + D1 <= D, ALIGN), 1
        )
    tl.store(delta_ptr + i_h.to(tl.int64) * rows + q_row + o_m, b_delta, mask=m_m)
