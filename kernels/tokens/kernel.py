"""Triton kernels. B samples, L tokens, K of them kept, D width, P programs a position.

Program (l, p) holds what belongs to position l and walks samples p, p + P, ...: the position embedding is
read once, and its gradient needs no atomics, only a [P, L, D] buffer and one sum.
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
        slot = tl.load(restore_ptr + row)
        kept = slot < K
        p_x = (i_b * K_64 + slot) * D + o_d
        b_x = tl.load(x_ptr + p_x, mask=m_d & kept, other=0.0).to(tl.float32)
        b_out = tl.where(kept, b_x, b_masked) + b_pos
        tl.store(out_ptr + row * D + o_d, b_out.to(out_ptr.dtype.element_ty), mask=m_d)


@triton.jit
def unmask_tokens_bwd_kernel(
    dout_ptr, restore_ptr, dx_ptr, dmask_ptr, dpos_ptr, B, L, K, D, BLOCK_D: tl.constexpr
):
    """``dmask`` and ``dpos`` [P, L, D]: sums over samples p, p + P, ..., over masked ones and over all."""
    i_l, i_p, P = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    L_64, K_64 = L + tl.zeros([], dtype=tl.int64), K + tl.zeros([], dtype=tl.int64)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    b_dpos = tl.zeros([BLOCK_D], dtype=tl.float32)
    b_dmask = tl.zeros([BLOCK_D], dtype=tl.float32)
    for i_b in range(i_p, B, P):
        row = i_b * L_64 + i_l
        slot = tl.load(restore_ptr + row)
        kept = slot < K
        b_dout = tl.load(dout_ptr + row * D + o_d, mask=m_d, other=0.0)
        p_x = (i_b * K_64 + slot) * D + o_d
        tl.store(dx_ptr + p_x, b_dout.to(dx_ptr.dtype.element_ty), mask=m_d & kept)
        b_dpos += b_dout.to(tl.float32)
        b_dmask += tl.where(kept, 0.0, b_dout.to(tl.float32))
    p_part = (i_p * L + i_l) * D + o_d
    tl.store(dpos_ptr + p_part, b_dpos, mask=m_d)
    tl.store(dmask_ptr + p_part, b_dmask, mask=m_d)
