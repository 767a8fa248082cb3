"""Triton kernel. K tensors of R rows and D columns, in chunks of P rows. Float32 sums in a fixed order."""

import triton
import triton.language as tl


@triton.jit
def sum_chunks_kernel(
    x_ptr, first_ptr, second_ptr, third_ptr,
    R, P, D,
    BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """x [K, R, D] -> K (at most three) tensors [ceil(R / P), D]. Program (chunk and column block, k) sums one
    chunk of rows, with STAGES row blocks in flight."""
    chunks, i_k = tl.cdiv(R, P), tl.program_id(1)  # grid axes two and three are limited to 65,535
    i_c, i_d = (tl.program_id(0) % chunks).to(tl.int64), tl.program_id(0) // chunks
    o_d = i_d * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = o_d < D
    start = i_c * P
    end = tl.minimum(start + P, R)
    p_x = x_ptr + i_k.to(tl.int64) * R * D
    b_sums = tl.zeros([BLOCK_P, BLOCK_D], dtype=tl.float32)
    for row in tl.range(start, end, BLOCK_P, num_stages=STAGES):
        o_p = row + tl.arange(0, BLOCK_P)
        m_x = (o_p < end)[:, None] & m_d[None, :]
        b_sums += tl.load(p_x + o_p[:, None] * D + o_d[None, :], mask=m_x, other=0.0).to(tl.float32)
    b_sum = tl.sum(b_sums, axis=0)
    p_out = i_c * D + o_d
    if i_k == 0:
        tl.store(first_ptr + p_out, b_sum.to(first_ptr.dtype.element_ty), mask=m_d)
    elif i_k == 1:
        tl.store(second_ptr + p_out, b_sum.to(second_ptr.dtype.element_ty), mask=m_d)
    else:
        tl.store(third_ptr + p_out, b_sum.to(third_ptr.dtype.element_ty), mask=m_d)
