"""The Triton kernel. n pairs of samples (conditional, unconditional) with GUIDED, else n samples.

A sample has N numbers, and its output ``width``. Program (i, e) handles block e of pair i. It reads the
outputs of both halves once and steps both halves, or only the conditional one without BOTH. All arithmetic is
float32.
"""

import triton
import triton.language as tl


@triton.jit
def _load(ptr, offset, m_e):
    return tl.load(ptr + offset, mask=m_e, other=0.0).to(tl.float32)


@triton.jit
def _step(
    b_value, output_ptr, x_ptr, noise_ptr, coefficients_ptr, sample_ptr, xstart_ptr,
    i_b, o_e, m_e, N, width, stride_k,
    KIND: tl.constexpr, START_X: tl.constexpr, LEARNED: tl.constexpr, NOISE: tl.constexpr, CLIP: tl.constexpr,
):  # fmt: skip
    """Step one block of one sample: from the model's prediction to x_{t-1} and x_0."""
    p_k = coefficients_ptr + i_b * stride_k
    recip, recipm1 = tl.load(p_k), tl.load(p_k + 1)
    b_x = _load(x_ptr, i_b * N + o_e, m_e)
    if START_X:
        b_xstart = b_value
    else:
        b_xstart = recip * b_x - recipm1 * b_value
    if CLIP:
        b_xstart = tl.maximum(b_xstart, -1.0, propagate_nan=tl.PropagateNan.ALL)  # else NaN becomes -1
        b_xstart = tl.minimum(b_xstart, 1.0, propagate_nan=tl.PropagateNan.ALL)
    if KIND == 0:
        lower = tl.load(p_k + 4)
        b_log_variance = lower
        if LEARNED:
            b_fraction = (_load(output_ptr, i_b * width + N + o_e, m_e) + 1.0) * 0.5
            b_log_variance = b_fraction * tl.load(p_k + 5) + (1.0 - b_fraction) * lower
        b_sigma = tl.load(p_k + 6) * tl.exp(0.5 * b_log_variance)
        b_sample = tl.load(p_k + 2) * b_xstart + tl.load(p_k + 3) * b_x
    else:
        b_eps = (recip * b_x - b_xstart) / recipm1
        b_sigma = tl.load(p_k + 4)
        b_sample = b_xstart * tl.load(p_k + 2) + tl.load(p_k + 3) * b_eps
    if NOISE:
        b_sample += b_sigma * _load(noise_ptr, i_b * N + o_e, m_e)
    tl.store(sample_ptr + i_b * N + o_e, b_sample.to(sample_ptr.dtype.element_ty), mask=m_e)
    tl.store(xstart_ptr + i_b * N + o_e, b_xstart.to(xstart_ptr.dtype.element_ty), mask=m_e)


@triton.jit
def cfg_step_kernel(
    output_ptr, x_ptr, noise_ptr, coefficients_ptr, scale_ptr, sample_ptr, xstart_ptr,
    n, N, width, guided, stride_k, stride_scale,
    GUIDED: tl.constexpr, BOTH: tl.constexpr, KIND: tl.constexpr, START_X: tl.constexpr,
    LEARNED: tl.constexpr, NOISE: tl.constexpr, CLIP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Output is [B, width]; x and noise are [B, N] or [n, N]. Guidance applies to the first ``guided``
    numbers of an output."""
    i_b = tl.program_id(0).to(tl.int64)
    o_e = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m_e = o_e < N
    b_cond = _load(output_ptr, i_b * width + o_e, m_e)
    if GUIDED:
        b_uncond = _load(output_ptr, (n + i_b) * width + o_e, m_e)
        scale = tl.load(scale_ptr + i_b * stride_scale)
        b_guided = b_uncond + scale * (b_cond - b_uncond)
        b_cond = tl.where(o_e < guided, b_guided, b_cond)
        if BOTH:
            b_uncond = tl.where(o_e < guided, b_guided, b_uncond)
            _step(
                b_uncond, output_ptr, x_ptr, noise_ptr, coefficients_ptr, sample_ptr, xstart_ptr,
                n + i_b, o_e, m_e, N, width, stride_k, KIND, START_X, LEARNED, NOISE, CLIP,
            )  # fmt: skip
    _step(
        b_cond, output_ptr, x_ptr, noise_ptr, coefficients_ptr, sample_ptr, xstart_ptr,
        i_b, o_e, m_e, N, width, stride_k, KIND, START_X, LEARNED, NOISE, CLIP,
    )  # fmt: skip
