"""Triton kernels. R rows, D columns.

A row's scale is the least power of two by which its largest number is one of float8's (E4M3: 448 at most), so
that scaling rounds nothing. All arithmetic in float32.
"""

import triton
import triton.language as tl

from ..bias_gelu.kernel import sigmoid_of_twice_u


@triton.jit
def most(b_x, axis: tl.constexpr):
    """The largest magnitude along ``axis`` as the bits of a float32, of which infinity's and NaN's are the
    largest."""
    return tl.max(b_x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=axis)


@triton.jit
def scales(b_most):
    """Scale and its inverse for rows whose largest numbers have these bits; NaN for what is not finite."""
    # 448 is 1.75 * 2^8: a larger mantissa carries into the exponent.
    exponent = tl.maximum(((b_most + 0x1FFFFF) >> 23) - 8, 1)
    scale = (exponent << 23).to(tl.float32, bitcast=True)
    inverse = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    return tl.where(b_most < 0x7F800000, scale, float("nan")), inverse


@triton.jit
def quantize_rows_kernel(
    x_ptr, bias_ptr, factor_ptr, out_ptr, scale_ptr,
    R, D,
    GELU: tl.constexpr, FACTOR: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Program p takes rows p, p + P, ..., STAGES of them on their way at a time. GELU: of ``x + bias``, which
    is what is rounded. FACTOR: times one number for each column."""
    i_p, P = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    if GELU:
        b_bias = tl.load(bias_ptr + o_d, mask=m_d, other=0.0).to(tl.float32)
    if FACTOR:
        b_factor = tl.load(factor_ptr + o_d, mask=m_d, other=0.0).to(tl.float32)
    for i in tl.range(0, tl.cdiv(R - i_p, P), num_stages=STAGES):
        i_r = i_p + i * P
        p_row = i_r * D + o_d
        b_x = tl.load(x_ptr + p_row, mask=m_d, other=0.0).to(tl.float32)
        if GELU:
            b_z = b_x + b_bias
            b_x = tl.where(m_d, b_z * sigmoid_of_twice_u(b_z), 0.0)
        if FACTOR:
            b_x = b_x * b_factor
        scale, inverse = scales(most(b_x, 0))
        tl.store(out_ptr + p_row, (b_x * inverse).to(out_ptr.dtype.element_ty), mask=m_d)
        tl.store(scale_ptr + i_r, scale)


@triton.jit
def quantize_weight_kernel(
    weight_ptr, rows_ptr, columns_ptr, scale_ptr,
    outputs, D,
    COLUMNS: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Program i takes BLOCK_O rows, twice: what is read for their scales comes from the cache when it is
    rounded. COLUMNS: it is written transposed, too."""
    o_o = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    m_o = o_o < outputs
    p_rows = o_o.to(tl.int64)[:, None] * D
    b_most = tl.zeros([BLOCK_O], dtype=tl.int32)
    for start in tl.range(0, D, BLOCK_D):
        o_d = start + tl.arange(0, BLOCK_D)
        m_tile = m_o[:, None] & (o_d < D)[None, :]
        b_w = tl.load(weight_ptr + p_rows + o_d[None, :], mask=m_tile, other=0.0).to(tl.float32)
        b_most = tl.maximum(b_most, most(b_w, 1))
    b_scale, b_inverse = scales(b_most)
    tl.store(scale_ptr + o_o, b_scale, mask=m_o)
    for start in tl.range(0, D, BLOCK_D):
        o_d = start + tl.arange(0, BLOCK_D)
        m_tile = m_o[:, None] & (o_d < D)[None, :]
        b_w = tl.load(weight_ptr + p_rows + o_d[None, :], mask=m_tile, other=0.0).to(tl.float32)
        b_out = (b_w * b_inverse[:, None]).to(rows_ptr.dtype.element_ty)
        tl.store(rows_ptr + p_rows + o_d[None, :], b_out, mask=m_tile)
        if COLUMNS:
            p_columns = o_d.to(tl.int64)[:, None] * outputs + o_o[None, :]
            tl.store(columns_ptr + p_columns, tl.trans(b_out), mask=tl.trans(m_tile))
