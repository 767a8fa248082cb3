"""Triton kernels: forward. B samples, H heads, M queries, N keys, d head size, G grid side.

Tensors are strided [B, H, rows, d]. With RAGGED, that B is 1, and ``offsets`` [B + 1] are the cumulative
sequence lengths. ``lse`` and ``delta`` are [H, all rows]. A head is held as D0 + D1 columns (72 as 64 + 16,
of which 8 are read), so that nothing is padded to 128.

The bias of a score is ``bias[h, row term of the query + column term of the key]``. With LOOKUP the two terms
are coordinates whose sum indexes the table [H, (2G-1)^2 + 3]; with DENSE it indexes a bias [H, G*G, G*G] that
the batch shares. The softmax is in base 2: scores and biases are multiplied by LOG2E.

With DIRECT (NVIDIA), biases and other numbers that are read one by one go from the L1 cache directly into
registers. Triton would prefetch them through shared memory, four bytes per instruction.
"""

import triton
import triton.language as tl

NO_BIAS, LOOKUP, DENSE = 0, 1, 2
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _sample(offsets_ptr, i_b, length, RAGGED: tl.constexpr):
    """The first row of sample ``i_b`` among all rows, and its number of rows, at most ``length``."""
    if RAGGED:
        start = tl.load(offsets_ptr + i_b).to(tl.int64)
        return start, tl.minimum((tl.load(offsets_ptr + i_b + 1) - start).to(tl.int32), length)
    return i_b * length, length


@triton.jit
def _head(i_b, i_h, row, stride_b, stride_h, stride_r, RAGGED: tl.constexpr, ALIGN: tl.constexpr):
    """The offset of head ``i_h`` of a sample. ALIGN tells Triton that it is a multiple of 8, which Triton
    cannot see at head size 72."""
    i_h = i_h.to(tl.int64)
    if RAGGED:
        return tl.multiple_of(row * stride_r + i_h * stride_h, ALIGN)
    return tl.multiple_of(i_b * stride_b + i_h * stride_h, ALIGN)


@triton.jit
def _load(ptr, o_r, m_r, stride_r, o_d, D: tl.constexpr, FIRST: tl.constexpr, ALIGN: tl.constexpr):
    """Load rows of a head at the columns ``o_d``, with zeros outside. FIRST columns need no mask."""
    p_tile = ptr + o_r[:, None] * (stride_r // ALIGN * ALIGN) + o_d[None, :]
    if FIRST:
        return tl.load(p_tile, mask=m_r[:, None], other=0.0)
    return tl.load(p_tile, mask=m_r[:, None] & (o_d < D)[None, :], other=0.0)


@triton.jit
def _store(ptr, o_r, m_r, stride_r, o_d, b_x, D: tl.constexpr, FIRST: tl.constexpr, ALIGN: tl.constexpr):
    p_tile = ptr + o_r[:, None] * (stride_r // ALIGN * ALIGN) + o_d[None, :]
    if FIRST:
        tl.store(p_tile, b_x.to(ptr.dtype.element_ty), mask=m_r[:, None])
    else:
        tl.store(p_tile, b_x.to(ptr.dtype.element_ty), mask=m_r[:, None] & (o_d < D)[None, :])


@triton.jit
def _read(address):
    return tl.inline_asm_elementwise(
        "ld.global.nc.f32 $0, [$1];", "=f,l", [address], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def _each(ptr, index, DIRECT: tl.constexpr):
    """Load float32 numbers one by one; they must not change while a kernel runs."""
    if DIRECT:
        return _read((ptr + index).to(tl.int64))
    return tl.load(ptr + index)


@triton.jit
def _low_half(ptr, index, DIRECT: tl.constexpr):
    """The same for eight-byte integers; only the low four bytes are read."""
    p = ptr + index
    if DIRECT:
        return tl.inline_asm_elementwise(
            "ld.global.nc.b32 $0, [$1];", "=r,l", [p.to(tl.int64)], dtype=tl.int32, is_pure=True, pack=1
        )
    return tl.load(p).to(tl.int32)


@triton.jit
def _position(pos_ptr, row, o_r, length, POSITIONS: tl.constexpr, G: tl.constexpr, DIRECT: tl.constexpr):
    """Grid positions of tokens, clamped to the grid, so that nothing outside the table is ever read."""
    if POSITIONS:
        pos = _low_half(pos_ptr + row, tl.minimum(o_r, length - 1), DIRECT)
        return tl.minimum(pos.to(tl.uint32, bitcast=True), G * G - 1).to(tl.int32)
    return tl.minimum(o_r, G * G - 1)


@triton.jit
def _query_term(pos, BIAS: tl.constexpr, G: tl.constexpr):
    if BIAS == 1:
        return pos // G * (2 * G - 1) + pos % G
    return pos * (G * G)


@triton.jit
def _key_term(pos, BIAS: tl.constexpr, G: tl.constexpr):
    if BIAS == 1:
        return 2 * G * (G - 1) - (pos // G * (2 * G - 1) + pos % G)
    return pos


@triton.jit
def _bias(p_bias, row_term, column_term, DIRECT: tl.constexpr):
    """The bias of a tile of scores. It needs no mask: terms of rows out of range also point into the bias."""
    if DIRECT:
        address = (p_bias + row_term).to(tl.int64)[:, None] + (4 * column_term).to(tl.uint32).to(tl.int64)[
            None, :
        ]
        return _read(address)
    return tl.load(p_bias + row_term[:, None] + column_term[None, :])


@triton.jit
def _dot(a, b, PRECISION: tl.constexpr):
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def rel_attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, bias_ptr, q_pos_ptr, k_pos_ptr, q_offsets_ptr, k_offsets_ptr, out_ptr, lse_ptr,
    H, M, N, rows, n_blocks, bias_size, scale,
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_ob, stride_oh, stride_om,
    BIAS: tl.constexpr, Q_POSITIONS: tl.constexpr, K_POSITIONS: tl.constexpr, RAGGED: tl.constexpr,
    G: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, ALIGN: tl.constexpr,
    PRECISION: tl.constexpr, DIRECT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One block of queries of one head over all keys; ``lse`` is log(sum(exp(score)))."""
    pid = tl.program_id(0)
    i_m, i_h, i_b = pid % n_blocks, pid // n_blocks % H, (pid // n_blocks // H).to(tl.int64)
    q_row, M = _sample(q_offsets_ptr, i_b, M, RAGGED)
    k_row, N = _sample(k_offsets_ptr, i_b, N, RAGGED)
    if i_m * BLOCK_M >= M:
        return
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    m_m = o_m < M
    o_d0 = tl.arange(0, D0)
    q_ptr += _head(i_b, i_h, q_row, stride_qb, stride_qh, stride_qm, RAGGED, ALIGN)
    k_ptr += _head(i_b, i_h, k_row, stride_kb, stride_kh, stride_kn, RAGGED, ALIGN)
    v_ptr += _head(i_b, i_h, k_row, stride_vb, stride_vh, stride_vn, RAGGED, ALIGN)
    b_q0 = _load(q_ptr, o_m, m_m, stride_qm, o_d0, D, D0 <= D, ALIGN)
    b_acc0 = tl.zeros([BLOCK_M, D0], dtype=tl.float32)
    if D1:
        o_d1 = D0 + tl.arange(0, D1)
        b_q1 = _load(q_ptr, o_m, m_m, stride_qm, o_d1, D, D0 + D1 <= D, ALIGN)
        b_acc1 = tl.zeros([BLOCK_M, D1], dtype=tl.float32)
    if BIAS:
        p_bias = bias_ptr + i_h.to(tl.int64) * bias_size
        q_term = _query_term(_position(q_pos_ptr, q_row, o_m, M, Q_POSITIONS, G, DIRECT), BIAS, G)
    b_max = tl.full([BLOCK_M], -float("inf"), dtype=tl.float32)
    b_sum = tl.zeros([BLOCK_M], dtype=tl.float32)

    for start in range(0, N, BLOCK_N):
        o_n = start + tl.arange(0, BLOCK_N)
        m_n = o_n < N
        if BIAS:  # loaded first, so it is in flight while the tensor cores work
            k_term = _key_term(_position(k_pos_ptr, k_row, o_n, N, K_POSITIONS, G, DIRECT), BIAS, G)
            b_bias = _bias(p_bias, q_term, k_term, DIRECT)
        b_s = _dot(b_q0, _load(k_ptr, o_n, m_n, stride_kn, o_d0, D, D0 <= D, ALIGN).trans(), PRECISION)
        if D1:
            b_k1 = _load(k_ptr, o_n, m_n, stride_kn, o_d1, D, D0 + D1 <= D, ALIGN)
            b_s += _dot(b_q1, b_k1.trans(), PRECISION)
        b_s *= scale * LOG2E
        if BIAS:
            b_s += b_bias
        b_s = tl.where(m_n[None, :], b_s, -float("inf"))
        b_max_new = tl.maximum(b_max, tl.max(b_s, 1))
        b_p = tl.exp2(b_s - b_max_new[:, None])
        b_shrink = tl.exp2(b_max - b_max_new)
        b_sum = b_sum * b_shrink + tl.sum(b_p, 1)
        b_max = b_max_new
        b_p = b_p.to(v_ptr.dtype.element_ty)
        b_v0 = _load(v_ptr, o_n, m_n, stride_vn, o_d0, D, D0 <= D, ALIGN)
        b_acc0 = b_acc0 * b_shrink[:, None] + _dot(b_p, b_v0, PRECISION)
        if D1:
            b_v1 = _load(v_ptr, o_n, m_n, stride_vn, o_d1, D, D0 + D1 <= D, ALIGN)
            b_acc1 = b_acc1 * b_shrink[:, None] + _dot(b_p, b_v1, PRECISION)

    # A query without keys gives zeros.
    b_inverse = tl.where(b_sum > 0, 1.0 / tl.where(b_sum > 0, b_sum, 1.0), 0.0)
    out_ptr += _head(i_b, i_h, q_row, stride_ob, stride_oh, stride_om, RAGGED, ALIGN)
    _store(out_ptr, o_m, m_m, stride_om, o_d0, b_acc0 * b_inverse[:, None], D, D0 <= D, ALIGN)
    if D1:
        _store(out_ptr, o_m, m_m, stride_om, o_d1, b_acc1 * b_inverse[:, None], D, D0 + D1 <= D, ALIGN)
    b_lse = tl.where(b_sum > 0, b_max / LOG2E + tl.log(tl.where(b_sum > 0, b_sum, 1.0)), 0.0)
    tl.store(lse_ptr + i_h.to(tl.int64) * rows + q_row + o_m, b_lse, mask=m_m)
