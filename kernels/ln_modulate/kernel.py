"""Triton kernels. B samples, L tokens per sample (ragged with OFFSETS), D width, P programs per sample.

Program (b, p) walks tokens p, p + P, ... of sample b with its modulation in registers. Sums over tokens need
no atomics: each program writes its partial sum into a [B, P, D] buffer. Statistics and sums are float32.
STAGES rows are in flight at a time.
"""

import triton
import triton.language as tl

from ..float8.kernel import most, scales


@triton.jit
def _tokens_of(offsets_ptr, i_b, L, OFFSETS: tl.constexpr):
    """The first row of sample ``i_b`` and its number of tokens."""
    if OFFSETS:
        start = tl.load(offsets_ptr + i_b).to(tl.int64)
        length = tl.load(offsets_ptr + i_b + 1).to(tl.int64) - start
    else:
        start = i_b * L
        length = L
    return start, length


@triton.jit
def _row(ptr, offset, m_d):
    """Load a vector of D numbers as float32, with zeros beyond D."""
    return tl.load(ptr + offset, mask=m_d, other=0.0).to(tl.float32)


@triton.jit
def ln_modulate_fwd_kernel(
    x_ptr, y_ptr, gate_ptr, shift_ptr, scale_ptr, offsets_ptr, residual_ptr, out_ptr, out_scale_ptr, mean_ptr,
    rstd_ptr,
    L, D, stride_gate, stride_shift, stride_scale, eps,
    GATED: tl.constexpr, OFFSETS: tl.constexpr, FLOAT8: tl.constexpr, BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """FLOAT8 writes ``out`` in float8, with one scale per row."""
    i_b, i_p, P = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    b_shift = _row(shift_ptr, i_b * stride_shift + o_d, m_d)
    b_scale = _row(scale_ptr, i_b * stride_scale + o_d, m_d)
    if GATED:
        b_gate = _row(gate_ptr, i_b * stride_gate + o_d, m_d)
    start, length = _tokens_of(offsets_ptr, i_b, L, OFFSETS)
    for i_l in tl.range(i_p, length, P, num_stages=STAGES):
        row = start + i_l
        p_row = row * D + o_d
        b_x = _row(x_ptr, p_row, m_d)
        if GATED:
            b_residual = (b_x + b_gate * _row(y_ptr, p_row, m_d)).to(residual_ptr.dtype.element_ty)
            tl.store(residual_ptr + p_row, b_residual, mask=m_d)
            # Normalise the residual as stored, after rounding.
            b_x = b_residual.to(tl.float32)
        mean = tl.sum(b_x, axis=0) / D
        b_centred = tl.where(m_d, b_x - mean, 0.0)
        rstd = 1.0 / tl.sqrt(tl.sum(b_centred * b_centred, axis=0) / D + eps)
        b_out = b_centred * rstd * (1.0 + b_scale) + b_shift
        if FLOAT8:
            out_scale, inverse = scales(most(tl.where(m_d, b_out, 0.0)))
            tl.store(out_scale_ptr + row, out_scale)
            b_out = b_out * inverse
        tl.store(out_ptr + p_row, b_out.to(out_ptr.dtype.element_ty), mask=m_d)
        tl.store(mean_ptr + row, mean)
        tl.store(rstd_ptr + row, rstd)


@triton.jit
def ln_modulate_bwd_kernel(
    x_ptr, y_ptr, gate_ptr, shift_ptr, scale_ptr, offsets_ptr, mean_ptr, rstd_ptr, dresidual_ptr, dout_ptr,
    dx_ptr, dy_ptr, dgate_ptr, dshift_ptr, dscale_ptr, out_ptr,
    L, D, stride_gate, stride_shift, stride_scale,
    GATED: tl.constexpr, RESIDUAL: tl.constexpr, OFFSETS: tl.constexpr, RECOMPUTE: tl.constexpr,
    BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """``dgate``, ``dshift`` and ``dscale`` are partial sums [B, P, D]. GATED recomputes the residual.
    RESIDUAL adds ``dresidual`` to the residual's gradient. RECOMPUTE writes the forward pass's output again,
    to ``out``. All loads of a row come before its first store or sum, because a later load would wait for
    them."""
    i_b, i_p, P = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    b_scale = 1.0 + _row(scale_ptr, i_b * stride_scale + o_d, m_d)
    b_dshift = tl.zeros([BLOCK_D], dtype=tl.float32)
    b_dscale = tl.zeros([BLOCK_D], dtype=tl.float32)
    if GATED:
        b_gate = _row(gate_ptr, i_b * stride_gate + o_d, m_d)
        b_dgate = tl.zeros([BLOCK_D], dtype=tl.float32)
    if RECOMPUTE:
        b_shift = _row(shift_ptr, i_b * stride_shift + o_d, m_d)
    start, length = _tokens_of(offsets_ptr, i_b, L, OFFSETS)
    for i_l in tl.range(i_p, length, P, num_stages=STAGES):
        row = start + i_l
        p_row = row * D + o_d
        mean = tl.load(mean_ptr + row)
        rstd = tl.load(rstd_ptr + row)
        b_x = _row(x_ptr, p_row, m_d)
        b_dout = _row(dout_ptr, p_row, m_d)
        if GATED:
            b_y = _row(y_ptr, p_row, m_d)
        if RESIDUAL:
            b_dresidual = _row(dresidual_ptr, p_row, m_d)
        if GATED:
            b_x = (b_x + b_gate * b_y).to(x_ptr.dtype.element_ty).to(tl.float32)
        b_normal = tl.where(m_d, (b_x - mean) * rstd, 0.0)
        if RECOMPUTE:
            b_out = b_normal * b_scale + b_shift
            tl.store(out_ptr + p_row, b_out.to(out_ptr.dtype.element_ty), mask=m_d)
        b_dshift += b_dout
        b_dscale += b_dout * b_normal
        b_dnormal = b_dout * b_scale
        along = tl.sum(b_dnormal * b_normal, axis=0) / D
        b_dx = (b_dnormal - tl.sum(b_dnormal, axis=0) / D - b_normal * along) * rstd
        if RESIDUAL:
            b_dx += b_dresidual
        if GATED:
            b_dgate += b_y * b_dx
            tl.store(dy_ptr + p_row, (b_gate * b_dx).to(dy_ptr.dtype.element_ty), mask=m_d)
        tl.store(dx_ptr + p_row, b_dx.to(dx_ptr.dtype.element_ty), mask=m_d)
    p_part = (i_b * P + i_p) * D + o_d
    tl.store(dshift_ptr + p_part, b_dshift, mask=m_d)
    tl.store(dscale_ptr + p_part, b_dscale, mask=m_d)
    if GATED:
        tl.store(dgate_ptr + p_part, b_dgate, mask=m_d)


@triton.jit
def gate_residual_fwd_kernel(
    x_ptr, y_ptr, gate_ptr, offsets_ptr, out_ptr,
    L, D, stride_gate,
    OFFSETS: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    i_b, i_p, P = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    b_gate = _row(gate_ptr, i_b * stride_gate + o_d, m_d)
    start, length = _tokens_of(offsets_ptr, i_b, L, OFFSETS)
    for i_l in tl.range(i_p, length, P, num_stages=STAGES):
        p_row = (start + i_l) * D + o_d
        b_out = _row(x_ptr, p_row, m_d) + b_gate * _row(y_ptr, p_row, m_d)
        tl.store(out_ptr + p_row, b_out.to(out_ptr.dtype.element_ty), mask=m_d)


@triton.jit
def gate_residual_bwd_kernel(
    y_ptr, gate_ptr, offsets_ptr, dout_ptr, dy_ptr, dgate_ptr,
    L, D, stride_gate,
    OFFSETS: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """``dgate`` is partial sums [B, P, D]. The gradient of x is the gradient of the output."""
    i_b, i_p, P = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    b_gate = _row(gate_ptr, i_b * stride_gate + o_d, m_d)
    b_dgate = tl.zeros([BLOCK_D], dtype=tl.float32)
    start, length = _tokens_of(offsets_ptr, i_b, L, OFFSETS)
    for i_l in tl.range(i_p, length, P, num_stages=STAGES):
        p_row = (start + i_l) * D + o_d
        b_dout = _row(dout_ptr, p_row, m_d)
        b_y = _row(y_ptr, p_row, m_d)
        b_dgate += b_y * b_dout
        tl.store(dy_ptr + p_row, (b_gate * b_dout).to(dy_ptr.dtype.element_ty), mask=m_d)
    p_part = (i_b * P + i_p) * D + o_d
    tl.store(dgate_ptr + p_part, b_dgate, mask=m_d)
