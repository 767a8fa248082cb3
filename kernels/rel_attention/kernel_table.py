"""Triton kernels: the table expanded to a bias, and the table's gradient. Names are as in ``kernel.py``.

The gradient is computed in two steps. The first forms ``dbias`` [parts, H, G*G, G*G]: for every pair of grid
positions, the sum of dS over the samples that keep both. ``slots`` [B, G*G] is the token of a sample at each
grid position, or -1 for none. dS is either recomputed from q, k, v and dO and summed over samples in
registers, or read as the kernel for the gradients of k and v stored it; that read can also yield the gradient
of q. In the second step, each row of the table is a sum along one diagonal of ``dbias``. Every sum has one
owner and one order, so there are no atomics.
"""

import triton
import triton.language as tl

from .kernel import LOG2E, _bias, _dot, _head, _key_term, _load, _query_term, _sample, _store


@triton.jit
def rel_attention_slots_kernel(
    pos_ptr, offsets_ptr, slots_ptr, placed_ptr, length, RAGGED: tl.constexpr, G: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """``slots`` of one sample. ``placed`` [B] is 0 if a token's position is taken or outside the grid, else
    1."""
    i_b = tl.program_id(0).to(tl.int64)
    row, length = _sample(offsets_ptr, i_b, length, RAGGED)
    slots_ptr += i_b * (G * G)
    for start in range(0, G * G, BLOCK):
        o = start + tl.arange(0, BLOCK)
        tl.store(slots_ptr + o, tl.full([BLOCK], -1, dtype=tl.int32), mask=o < G * G)
    tl.debug_barrier()
    for start in range(0, length, BLOCK):
        o = start + tl.arange(0, BLOCK)
        pos = tl.load(pos_ptr + row + o, mask=o < length, other=-1)
        tl.store(slots_ptr + pos, o.to(tl.int32), mask=(pos >= 0) & (pos < G * G))
    tl.debug_barrier()
    missing = length + tl.zeros([], dtype=tl.int32)
    for start in range(0, G * G, BLOCK):
        o = start + tl.arange(0, BLOCK)
        slot = tl.load(slots_ptr + o, mask=o < G * G, other=-1)
        missing -= tl.sum((slot >= 0).to(tl.int32), 0)
    tl.store(placed_ptr + i_b, (missing == 0).to(tl.int32))


@triton.jit
def rel_attention_bias_kernel(
    table_ptr, bias_ptr, bias_size, G: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """A tile of the bias [H, G*G, G*G] from the table [H, (2G-1)^2 + 3]."""
    i_h = tl.program_id(2).to(tl.int64)
    o_m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (o_m < G * G)[:, None] & (o_n < G * G)[None, :]
    index = _query_term(o_m, 1, G)[:, None] + _key_term(o_n, 1, G)[None, :]
    b_bias = tl.load(table_ptr + i_h * bias_size + index, mask=inside, other=0.0)
    p_bias = bias_ptr + i_h * (G * G * G * G) + o_m[:, None] * (G * G) + o_n[None, :]
    tl.store(p_bias, b_bias, mask=inside)


@triton.jit
def _token(slots_ptr, i_b, o_pos, SLOTS: tl.constexpr, G: tl.constexpr):
    """The tokens of a sample at these grid positions, and whether there are any."""
    if SLOTS:
        slot = tl.load(slots_ptr + i_b * (G * G) + o_pos, mask=o_pos < G * G, other=-1)
        return tl.maximum(slot, 0), slot >= 0
    return o_pos, o_pos < G * G


@triton.jit
def rel_attention_bwd_bias_kernel(
    q_ptr, k_ptr, v_ptr, bias_ptr, q_slots_ptr, k_slots_ptr, q_offsets_ptr, k_offsets_ptr, dout_ptr,
    lse_ptr, delta_ptr, dbias_ptr,
    B, first, heads, M, N, rows, n_blocks, bias_size, scale,
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_ob, stride_oh, stride_om,
    Q_SLOTS: tl.constexpr, K_SLOTS: tl.constexpr, RAGGED: tl.constexpr,
    G: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, ALIGN: tl.constexpr,
    PRECISION: tl.constexpr, DIRECT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A tile of ``dbias`` [parts, heads, G*G, G*G], for heads from ``first`` on. Scores are recomputed."""
    i_n, i_m = tl.program_id(0) % n_blocks, tl.program_id(0) // n_blocks
    i_head, i_p, parts = tl.program_id(1), tl.program_id(2), tl.num_programs(2)
    i_h = first + i_head
    o_m, o_n = i_m * BLOCK_M + tl.arange(0, BLOCK_M), i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    o_d0 = tl.arange(0, D0)
    o_d1 = D0 + tl.arange(0, D1 if D1 else 1)
    q_term = _query_term(tl.minimum(o_m, G * G - 1), 1, G)
    k_term = _key_term(tl.minimum(o_n, G * G - 1), 1, G)
    b_bias = _bias(bias_ptr + i_h.to(tl.int64) * bias_size, q_term, k_term, DIRECT)
    b_dbias = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for sample in range(i_p, B, parts):
        i_b = sample + tl.zeros([], dtype=tl.int64)
        q_row, _ = _sample(q_offsets_ptr, i_b, M, RAGGED)
        k_row, _ = _sample(k_offsets_ptr, i_b, N, RAGGED)
        t_m, m_m = _token(q_slots_ptr, i_b, o_m, Q_SLOTS, G)
        t_n, m_n = _token(k_slots_ptr, i_b, o_n, K_SLOTS, G)
        p_q = q_ptr + _head(i_b, i_h, q_row, stride_qb, stride_qh, stride_qm, RAGGED, ALIGN)
        p_k = k_ptr + _head(i_b, i_h, k_row, stride_kb, stride_kh, stride_kn, RAGGED, ALIGN)
        p_v = v_ptr + _head(i_b, i_h, k_row, stride_vb, stride_vh, stride_vn, RAGGED, ALIGN)
        p_do = dout_ptr + _head(i_b, i_h, q_row, stride_ob, stride_oh, stride_om, RAGGED, ALIGN)
        b_q0 = _load(p_q, t_m, m_m, stride_qm, o_d0, D, D0 <= D, ALIGN)
        b_s = _dot(b_q0, _load(p_k, t_n, m_n, stride_kn, o_d0, D, D0 <= D, ALIGN).trans(), PRECISION)
        b_do0 = _load(p_do, t_m, m_m, stride_om, o_d0, D, D0 <= D, ALIGN)
        b_dp = _dot(b_do0, _load(p_v, t_n, m_n, stride_vn, o_d0, D, D0 <= D, ALIGN).trans(), PRECISION)
        if D1:
            b_q1 = _load(p_q, t_m, m_m, stride_qm, o_d1, D, D0 + D1 <= D, ALIGN)
            b_k1 = _load(p_k, t_n, m_n, stride_kn, o_d1, D, D0 + D1 <= D, ALIGN)
            b_s += _dot(b_q1, b_k1.trans(), PRECISION)
            b_do1 = _load(p_do, t_m, m_m, stride_om, o_d1, D, D0 + D1 <= D, ALIGN)
            b_v1 = _load(p_v, t_n, m_n, stride_vn, o_d1, D, D0 + D1 <= D, ALIGN)
            b_dp += _dot(b_do1, b_v1.trans(), PRECISION)
        p_row = i_h.to(tl.int64) * rows + q_row + t_m
        b_lse = tl.load(lse_ptr + p_row, mask=m_m, other=0.0) * LOG2E
        b_delta = tl.load(delta_ptr + p_row, mask=m_m, other=0.0)
        b_p = tl.exp2(b_s * (scale * LOG2E) + b_bias - b_lse[:, None])
        b_dbias += tl.where(m_m[:, None] & m_n[None, :], b_p * (b_dp - b_delta[:, None]), 0.0)
    p_dbias = dbias_ptr + (i_p * heads + i_head).to(tl.int64) * (G * G * G * G) + o_m[:, None] * (G * G)
    tl.store(p_dbias + o_n[None, :], b_dbias, mask=(o_m < G * G)[:, None] & (o_n < G * G)[None, :])


@triton.jit
def rel_attention_bwd_gather_kernel(
    ds_ptr, k_ptr, q_slots_ptr, k_slots_ptr, q_offsets_ptr, k_offsets_ptr, dq_ptr, dbias_ptr,
    first, samples, H, M, N, n_blocks, scale,
    stride_dsh, stride_dsn, stride_kb, stride_kh, stride_kn, stride_dqb, stride_dqh, stride_dqm,
    Q_SLOTS: tl.constexpr, K_SLOTS: tl.constexpr, RAGGED: tl.constexpr,
    G: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, ALIGN: tl.constexpr,
    PRECISION: tl.constexpr, QUERIES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Add dS [samples from ``first``, H, N, G*G] to a tile of ``dbias`` [parts, H, G*G, G*G]; each part takes
    every ``parts``-th sample. With ``first`` 0, the tile is set instead. QUERIES, for tiles that have all
    keys, also computes dQ."""
    i_n, i_m, i_h = tl.program_id(0) % n_blocks, tl.program_id(0) // n_blocks, tl.program_id(1)
    i_p, parts = tl.program_id(2), tl.num_programs(2)
    o_m, o_n = i_m * BLOCK_M + tl.arange(0, BLOCK_M), i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    o_d0 = tl.arange(0, D0)
    o_d1 = D0 + tl.arange(0, D1 if D1 else 1)
    inside = (o_n < G * G)[:, None] & (o_m < G * G)[None, :]
    p_dbias = (
        dbias_ptr + (i_p * H + i_h).to(tl.int64) * (G * G * G * G) + o_m[None, :] * (G * G) + o_n[:, None]
    )
    b_dbias = tl.load(p_dbias, mask=inside & (first > 0), other=0.0)
    for sample in range(i_p, samples, parts):
        i_b = sample + tl.zeros([], dtype=tl.int64)
        t_m, m_m = _token(q_slots_ptr, first + i_b, o_m, Q_SLOTS, G)
        t_n, m_n = _token(k_slots_ptr, first + i_b, o_n, K_SLOTS, G)
        p_ds = ds_ptr + (i_b * H + i_h) * stride_dsh + (t_n[:, None] * stride_dsn + o_m[None, :])
        b_ds = tl.load(p_ds, mask=m_n[:, None], other=0.0)
        # Columns without a query were never written, so they are masked here. The product below may read
        # them: they affect only their own rows of dQ, which are not stored.
        b_dbias += tl.where(m_m[None, :], b_ds.to(tl.float32), 0.0)
        if QUERIES:
            i_b += first
            q_row, _ = _sample(q_offsets_ptr, i_b, M, RAGGED)
            k_row, _ = _sample(k_offsets_ptr, i_b, N, RAGGED)
            p_k = k_ptr + _head(i_b, i_h, k_row, stride_kb, stride_kh, stride_kn, RAGGED, ALIGN)
            p_dq = dq_ptr + _head(i_b, i_h, q_row, stride_dqb, stride_dqh, stride_dqm, RAGGED, ALIGN)
            b_dst = b_ds.trans()
            b_dq0 = _dot(b_dst, _load(p_k, t_n, m_n, stride_kn, o_d0, D, D0 <= D, ALIGN), PRECISION)
            _store(p_dq, t_m, m_m, stride_dqm, o_d0, b_dq0 * scale, D, D0 <= D, ALIGN)
            if D1:
                b_dq1 = _dot(b_dst, _load(p_k, t_n, m_n, stride_kn, o_d1, D, D0 + D1 <= D, ALIGN), PRECISION)
                _store(p_dq, t_m, m_m, stride_dqm, o_d1, b_dq1 * scale, D, D0 + D1 <= D, ALIGN)
    tl.store(p_dbias, b_dbias, mask=inside)


@triton.jit
def rel_attention_bwd_table_kernel(
    dbias_ptr, dtable_ptr, first, parts, heads, H,
    G: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """``dtable`` [(2G-1)^2 + 3, H] for one row difference of one head: sums along diagonals of ``dbias``."""
    i_r, i_head = tl.program_id(0), tl.program_id(1)
    o_w, o_q = tl.arange(0, BLOCK_W)[None, :, None], tl.arange(0, BLOCK_G)[None, None, :]
    o_k = o_q - o_w + (G - 1)
    inside = (o_q < G) & (o_k >= 0) & (o_k < G)
    b_sum = tl.zeros([BLOCK_R, BLOCK_W, BLOCK_G], dtype=tl.float32)
    # Query row r_q and key row r_q - (i_r - (G-1)), both inside the grid; BLOCK_R pairs are read at once.
    low, high = tl.maximum(i_r - (G - 1), 0), tl.minimum(i_r + 1, G)
    for part in range(parts):
        p_part = dbias_ptr + (part * heads + i_head).to(tl.int64) * (G * G * G * G)
        for start in range(low, high, BLOCK_R):
            r_q = start + tl.arange(0, BLOCK_R)[:, None, None]
            r_k = r_q - i_r + (G - 1)
            p_tile = p_part + (r_q * G + o_q) * (G * G) + r_k * G + o_k
            b_sum += tl.load(p_tile, mask=inside & (r_q < high), other=0.0)
    o_w = tl.arange(0, BLOCK_W)
    p_table = dtable_ptr + (i_r * (2 * G - 1) + o_w) * H + first + i_head
    b_row = tl.sum(tl.sum(b_sum, 2), 0)
    tl.store(p_table, b_row.to(dtable_ptr.dtype.element_ty), mask=o_w < 2 * G - 1)
