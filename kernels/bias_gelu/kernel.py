"""Triton kernels. R rows, F features, P partial sums of dbias. All arithmetic is float32.

The tanh form of gelu(z) is z * sigmoid(2u) with u = sqrt(2/pi) (z + 0.044715 z^3).
"""

import triton
import triton.language as tl

FAR = tl.constexpr(256.0)


@triton.jit
def _tile(i_r, i_f, R, F, BLOCK_R: tl.constexpr, BLOCK_F: tl.constexpr):
    """Column indices, and the offsets and mask of a [BLOCK_R, BLOCK_F] tile."""
    o_r = i_r * BLOCK_R + tl.arange(0, BLOCK_R)
    o_f = i_f * BLOCK_F + tl.arange(0, BLOCK_F)
    p_tile = o_r.to(tl.int64)[:, None] * F + o_f[None, :]
    return o_f, p_tile, (o_r < R)[:, None] & (o_f < F)[None, :]


@triton.jit
def sigmoid_of_twice_u(b_z):
    """sigmoid(2u). The constant 1.5957691216 is 2 sqrt(2/pi)."""
    return 1.0 / (1.0 + tl.exp((b_z + 0.044715 * b_z * b_z * b_z) * -1.5957691216057308))


@triton.jit
def bias_gelu_fwd_kernel(x_ptr, bias_ptr, out_ptr, R, F, BLOCK_R: tl.constexpr, BLOCK_F: tl.constexpr):
    blocks_f = tl.cdiv(F, BLOCK_F)  # all tiles on one grid axis: the other axes are limited to 65,535
    i_r, i_f = tl.program_id(0) // blocks_f, tl.program_id(0) % blocks_f
    o_f, p_tile, m_tile = _tile(i_r, i_f, R, F, BLOCK_R, BLOCK_F)
    b_bias = tl.load(bias_ptr + o_f, mask=o_f < F, other=0.0).to(tl.float32)
    b_z = tl.load(x_ptr + p_tile, mask=m_tile, other=0.0).to(tl.float32) + b_bias[None, :]
    b_out = b_z * sigmoid_of_twice_u(b_z)
    tl.store(out_ptr + p_tile, b_out.to(out_ptr.dtype.element_ty), mask=m_tile)


@triton.jit
def bias_gelu_bwd_kernel(
    x_ptr, bias_ptr, dout_ptr, dx_ptr, dbias_ptr, out_ptr,
    R, F,
    RECOMPUTE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_F: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Program (f, p) walks row blocks p, p + P, ..., with STAGES of them in flight, and writes row p of the
    partial sums ``dbias`` [P, F]. RECOMPUTE writes the forward pass's output again, to ``out``."""
    i_f, i_p, P = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    o_f = i_f * BLOCK_F + tl.arange(0, BLOCK_F)
    b_bias = tl.load(bias_ptr + o_f, mask=o_f < F, other=0.0).to(tl.float32)
    b_dbias = tl.zeros([BLOCK_F], dtype=tl.float32)
    for i_r in tl.range(i_p, tl.cdiv(R, BLOCK_R), P, num_stages=STAGES):
        _, p_tile, m_tile = _tile(i_r, i_f, R, F, BLOCK_R, BLOCK_F)
        b_z = tl.load(x_ptr + p_tile, mask=m_tile, other=0.0).to(tl.float32) + b_bias[None, :]
        b_dout = tl.load(dout_ptr + p_tile, mask=m_tile, other=0.0).to(tl.float32)
        b_s = sigmoid_of_twice_u(b_z)
        b_out = b_z * b_s
        if RECOMPUTE:
            tl.store(out_ptr + p_tile, b_out.to(out_ptr.dtype.element_ty), mask=m_tile)
        # The slope of 2u. Far out the sigmoid is flat and the other factor 0, so the slope must stay finite.
        b_slope = (1.0 + 0.134145 * tl.minimum(b_z * b_z, FAR)) * 1.5957691216057308
        b_dz = b_dout * (b_s + b_out * (1.0 - b_s) * b_slope)
        b_dbias += tl.sum(b_dz, axis=0)
        tl.store(dx_ptr + p_tile, b_dz.to(dx_ptr.dtype.element_ty), mask=m_tile)
    tl.store(dbias_ptr + i_p * F + o_f, b_dbias, mask=o_f < F)
