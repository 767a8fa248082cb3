"""Triton kernels. R rows, D columns.

A row's scale is the smallest power of two that brings its largest number into the range of float8 (E4M3: at
most 448). As a power of two, it causes no rounding of its own. All arithmetic is float32.
"""

import triton
import triton.language as tl

from ..bias_gelu.kernel import sigmoid_of_twice_u


@triton.jit
def magnitude(b_x):
    """The magnitudes as float32 bit patterns; those of infinity and NaN compare as the largest."""
    return b_x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def most(b_x):
    """The largest magnitude of a row."""
    return tl.max(magnitude(b_x), axis=0)


@triton.jit
def scales(b_most):
    """Scale and inverse scale for rows whose largest magnitudes have these bits; the scale is NaN if the
    magnitude is not finite."""
    # 448 is 1.75 * 2^8: a larger mantissa carries into the exponent.
    exponent = tl.maximum(((b_most + 0x1FFFFF) >> 23) - 8, 1)
    scale = (exponent << 23).to(tl.float32, bitcast=True)
    inverse = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    return tl.where(b_most < 0x7F800000, scale, float("nan")), inverse


@triton.jit
def quantize_rows_kernel(
    x_ptr, bias_ptr, factor_ptr, out_ptr, scale_ptr, sums_ptr,
    R, D,
    GELU: tl.constexpr, FACTOR: tl.constexpr, SUMS: tl.constexpr, BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Program p takes rows p, p + P, ..., with STAGES of them in flight. GELU quantizes GELU of ``x + bias``
    instead of ``x``. FACTOR multiplies each column by one number. SUMS writes the sum of the program's rows
    of ``x`` to row p of ``sums`` [P, D]."""
    i_p, P = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    if GELU:
        b_bias = tl.load(bias_ptr + o_d, mask=m_d, other=0.0).to(tl.float32)
    if FACTOR:
        b_factor = tl.load(factor_ptr + o_d, mask=m_d, other=0.0).to(tl.float32)
    if SUMS:
        b_sum = tl.zeros([BLOCK_D], dtype=tl.float32)
    for i in tl.range(0, tl.cdiv(R - i_p, P), num_stages=STAGES):
        i_r = i_p + i * P
        p_row = i_r * D + o_d
        b_x = tl.load(x_ptr + p_row, mask=m_d, other=0.0).to(tl.float32)
        if SUMS:
            b_sum += b_x
        if GELU:
            b_z = b_x + b_bias
            b_x = tl.where(m_d, b_z * sigmoid_of_twice_u(b_z), 0.0)
        if FACTOR:
            b_x = b_x * b_factor
        scale, inverse = scales(most(b_x))
        tl.store(out_ptr + p_row, (b_x * inverse).to(out_ptr.dtype.element_ty), mask=m_d)
        tl.store(scale_ptr + i_r, scale)
    if SUMS:
        tl.store(sums_ptr + i_p * D + o_d, b_sum, mask=m_d)


@triton.jit
def weight_scales_kernel(weight_ptr, scale_ptr, D, BLOCK_D: tl.constexpr):
    """Program i computes the scale of row i."""
    i_o = tl.program_id(0).to(tl.int64)
    b_most = tl.zeros([BLOCK_D], dtype=tl.int32)
    for start in tl.range(0, D, BLOCK_D):
        o_d = start + tl.arange(0, BLOCK_D)
        b_w = tl.load(weight_ptr + i_o * D + o_d, mask=o_d < D, other=0.0).to(tl.float32)
        b_most = tl.maximum(b_most, magnitude(b_w))
    scale, _ = scales(tl.max(b_most, axis=0))
    tl.store(scale_ptr + i_o, scale)


@triton.jit
def quantize_weight_kernel(
    weight_ptr, scale_ptr, rows_ptr, columns_ptr, ones_ptr,
    outputs, D,
    COLUMNS: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Each program quantizes one tile with the scales of its rows. This second read of the weight mostly hits
    the cache. COLUMNS also writes the transposed tile, and ones [D] as the scales of the transpose."""
    blocks_d = tl.cdiv(D, BLOCK_D)  # all tiles on one grid axis: the other axes are limited to 65,535
    i_o, i_d = tl.program_id(0) // blocks_d, tl.program_id(0) % blocks_d
    o_o, o_d = i_o * BLOCK_O + tl.arange(0, BLOCK_O), i_d * BLOCK_D + tl.arange(0, BLOCK_D)
    m_o, m_d = o_o < outputs, o_d < D
    p_tile, m_tile = o_o.to(tl.int64)[:, None] * D + o_d[None, :], m_o[:, None] & m_d[None, :]
    b_scale = tl.load(scale_ptr + o_o, mask=m_o, other=1.0)
    b_w = tl.load(weight_ptr + p_tile, mask=m_tile, other=0.0).to(tl.float32)
    b_inverse = ((254 - (b_scale.to(tl.int32, bitcast=True) >> 23)) << 23).to(tl.float32, bitcast=True)
    b_out = (b_w * b_inverse[:, None]).to(rows_ptr.dtype.element_ty)
    tl.store(rows_ptr + p_tile, b_out, mask=m_tile)
    if COLUMNS:
        p_columns = o_d.to(tl.int64)[:, None] * outputs + o_o[None, :]
        tl.store(columns_ptr + p_columns, tl.trans(b_out), mask=tl.trans(m_tile))
        if i_o == 0:
            tl.store(ones_ptr + o_d, tl.full([BLOCK_D], 1.0, tl.float32), mask=m_d)
