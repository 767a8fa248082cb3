"""Triton kernels. B samples, L tokens, K kept, N = L - K masked, D width, P programs per position.

Gathering and merging move rows, with one program per written row. For unmasking, program (l, p) holds the
data of position l and walks samples p, p + P, .... It reads the position embedding once, and the embedding's
gradient needs no atomics, only a [P, L, D] buffer and one sum.
"""

import triton
import triton.language as tl


@triton.jit
def unmask_tokens_fwd_kernel(
    x_ptr, mask_token_ptr, pos_ptr, restore_ptr, out_ptr, B, L, K, D, BLOCK_D: tl.constexpr
):
    i_l, i_p, P = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    L_64, K_64 = L + tl.zeros([], dtype=tl.int64), K + tl.zeros([], dtype=tl.int64)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    b_pos = tl.load(pos_ptr + i_l * D + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_masked = tl.load(mask_token_ptr + o_d, mask=m_d, other=0.0).to(tl.float32)
    for i_b in range(i_p, B, P):
        row = i_b * L_64 + i_l
        slot = tl.maximum(tl.load(restore_ptr + row), 0)
        kept = slot < K
        p_x = (i_b * K_64 + slot) * D + o_d
        b_x = tl.load(x_ptr + p_x, mask=m_d & kept, other=0.0).to(tl.float32)
        b_out = tl.where(kept, b_x, b_masked) + b_pos
        tl.store(out_ptr + row * D + o_d, b_out.to(out_ptr.dtype.element_ty), mask=m_d)


@triton.jit
def unmask_tokens_bwd_kernel(
    dout_ptr, restore_ptr, dx_ptr, dmask_ptr, dpos_ptr, B, L, K, D, BLOCK_D: tl.constexpr
):
    """``dmask`` and ``dpos`` are [P, L, D]: sums over samples p, p + P, ..., of masked tokens and of all
    tokens."""
    i_l, i_p, P = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    L_64, K_64 = L + tl.zeros([], dtype=tl.int64), K + tl.zeros([], dtype=tl.int64)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    b_dpos = tl.zeros([BLOCK_D], dtype=tl.float32)
    b_dmask = tl.zeros([BLOCK_D], dtype=tl.float32)
    for i_b in range(i_p, B, P):
        row = i_b * L_64 + i_l
        slot = tl.maximum(tl.load(restore_ptr + row), 0)
        kept = slot < K
        b_dout = tl.load(dout_ptr + row * D + o_d, mask=m_d, other=0.0)
        p_x = (i_b * K_64 + slot) * D + o_d
        tl.store(dx_ptr + p_x, b_dout.to(dx_ptr.dtype.element_ty), mask=m_d & kept)
        b_dpos += b_dout.to(tl.float32)
        b_dmask += tl.where(kept, 0.0, b_dout.to(tl.float32))
    p_part = (i_p * L + i_l) * D + o_d
    tl.store(dpos_ptr + p_part, b_dpos, mask=m_d)
    tl.store(dmask_ptr + p_part, b_dmask, mask=m_d)


@triton.jit
def gather_tokens_fwd_kernel(x_ptr, ids_ptr, out_ptr, L, K, D, BLOCK_D: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    # Clamped, so that nothing outside x is ever read.
    i_l = tl.minimum(tl.maximum(tl.load(ids_ptr + row), 0), L - 1)
    b_x = tl.load(x_ptr + (row // K * L + i_l) * D + o_d, mask=m_d)
    tl.store(out_ptr + row * D + o_d, b_x, mask=m_d)


@triton.jit
def _next_slot(ids_ptr, i_l, after, K, BLOCK_K: tl.constexpr):
    """The first slot after ``after`` that holds token ``i_l``, or K if there is none."""
    slot = K
    for start in range(0, K, BLOCK_K):
        o_k = start + tl.arange(0, BLOCK_K)
        b_ids = tl.load(ids_ptr + o_k, mask=o_k < K, other=-1)
        slot = tl.minimum(slot, tl.min(tl.where((b_ids == i_l) & (o_k > after), o_k, K), axis=0))
    return slot


@triton.jit
def gather_tokens_bwd_kernel(
    dout_ptr, ids_ptr, restore_ptr, dx_ptr, L, K, D,
    RESTORE: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One row of dx: the sum of the rows of dout that were gathered from it, or zeros."""
    row = tl.program_id(0).to(tl.int64)
    i_b, i_l = row // L, row % L
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    p_dout = dout_ptr + i_b * K * D + o_d
    if RESTORE:
        slot = tl.maximum(tl.load(restore_ptr + row), 0)
        b_dx = tl.load(p_dout + slot * D, mask=m_d & (slot < K), other=0.0)
    else:
        b_dx = tl.zeros([BLOCK_D], dtype=tl.float32)
        slot = _next_slot(ids_ptr + i_b * K, i_l, -1, K, BLOCK_K)
        while slot < K:
            b_dx += tl.load(p_dout + slot.to(tl.int64) * D, mask=m_d, other=0.0).to(tl.float32)
            slot = _next_slot(ids_ptr + i_b * K, i_l, slot, K, BLOCK_K)
    tl.store(dx_ptr + row * D + o_d, b_dx.to(dx_ptr.dtype.element_ty), mask=m_d)


@triton.jit
def merge_tokens_fwd_kernel(x_ptr, computed_ptr, restore_ptr, out_ptr, L, N, D, BLOCK_D: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    slot = tl.minimum(tl.load(restore_ptr + row) - (L - N), N - 1)
    p_row = row * D
    if slot >= 0:
        b_out = tl.load(computed_ptr + (row // L * N + slot) * D + o_d, mask=m_d)
        tl.store(out_ptr + p_row + o_d, b_out, mask=m_d)
    else:
        tl.store(out_ptr + p_row + o_d, tl.load(x_ptr + p_row + o_d, mask=m_d), mask=m_d)


@triton.jit
def merge_tokens_bwd_kernel(dout_ptr, restore_ptr, dx_ptr, dcomputed_ptr, L, N, D, BLOCK_D: tl.constexpr):
    """dx is zero where a computed token was merged; every row of dcomputed belongs to one token."""
    row = tl.program_id(0).to(tl.int64)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    slot = tl.load(restore_ptr + row) - (L - N)
    b_dout = tl.load(dout_ptr + row * D + o_d, mask=m_d, other=0.0)
    masked = slot >= 0
    tl.store(dcomputed_ptr + (row // L * N + slot) * D + o_d, b_dout, mask=m_d & masked & (slot < N))
    tl.store(dx_ptr + row * D + o_d, tl.where(masked, 0.0, b_dout), mask=m_d)
