"""Triton kernels. B images, C channels, p patch side, G x G = L tokens, K selected, D width, P = C p p.

Patches are read directly from the image: number j of a patch is channel j // (p p), row j // p % p, column
j % p.
"""

import triton
import triton.language as tl


@triton.jit
def _patches(x_ptr, i_b, i_l, o_j, m_r, C, G, p: tl.constexpr):
    """Load numbers ``o_j`` of the patches at tokens ``i_l`` of images ``i_b``: [rows, numbers]."""
    S = G * p
    o_image = (o_j // (p * p)) * (S * S) + o_j // p % p * S + o_j % p
    o_token = i_b.to(tl.int64) * C * S * S + i_l // G * p * S + i_l % G * p
    inside = m_r[:, None] & (o_j < C * p * p)[None, :]
    return tl.load(x_ptr + o_token[:, None] + o_image[None, :], mask=inside, other=0.0)


@triton.jit
def patch_embed_fwd_kernel(
    x_ptr, weight_ptr, bias_ptr, pos_ptr, ids_ptr, out_ptr, R, L, K, C, G, D,
    p: tl.constexpr, IDS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Each program computes a tile of rows and columns of the output, which has R = B K rows."""
    o_r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    o_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_r, m_d = o_r < R, o_d < D
    i_b = o_r // K
    i_l = o_r % K
    if IDS:  # clamped, so that nothing outside the image is ever read
        i_l = tl.minimum(tl.maximum(tl.load(ids_ptr + o_r, mask=m_r, other=0).to(tl.int32), 0), L - 1)
    P = C * p * p
    b_out = tl.zeros([BLOCK_R, BLOCK_D], dtype=tl.float32)
    for start in range(0, P, BLOCK_J):
        o_j = start + tl.arange(0, BLOCK_J)
        b_x = _patches(x_ptr, i_b, i_l, o_j, m_r, C, G, p)
        p_weight = weight_ptr + o_d[None, :] * P + o_j[:, None]
        b_weight = tl.load(p_weight, mask=m_d[None, :] & (o_j < P)[:, None], other=0.0)
        b_out += tl.dot(b_x, b_weight, input_precision="ieee")
    b_out += tl.load(bias_ptr + o_d, mask=m_d, other=0.0).to(tl.float32)[None, :]
    tile = m_r[:, None] & m_d[None, :]
    b_out += tl.load(pos_ptr + i_l[:, None] * D + o_d[None, :], mask=tile, other=0.0).to(tl.float32)
    p_out = out_ptr + o_r.to(tl.int64)[:, None] * D + o_d[None, :]
    tl.store(p_out, b_out.to(out_ptr.dtype.element_ty), mask=tile)


@triton.jit
def patch_embed_bwd_kernel(
    x_ptr, ids_ptr, dout_ptr, dweight_ptr, dbias_ptr, dpos_ptr, B, L, K, C, G, D,
    p: tl.constexpr, IDS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Parameter gradients of one block of tokens and one of columns, over images i_p, i_p + parts, ....

    ``dweight`` [blocks, parts, D, P] and ``dbias`` [blocks, parts, D] are partial sums. So is ``dpos``
    [parts, L, D], which is not written with IDS: a block of tokens has other positions in each image then.
    """
    i_r, i_p, parts = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    o_r = i_r * BLOCK_R + tl.arange(0, BLOCK_R)
    n_d = tl.cdiv(D, BLOCK_D)
    i_d, i_j = tl.program_id(2) % n_d, tl.program_id(2) // n_d
    o_d = i_d * BLOCK_D + tl.arange(0, BLOCK_D)
    o_j = i_j * BLOCK_J + tl.arange(0, BLOCK_J)
    m_r, m_d, P = o_r < K, o_d < D, C * p * p
    tile = m_r[:, None] & m_d[None, :]
    b_dweight = tl.zeros([BLOCK_D, BLOCK_J], dtype=tl.float32)
    b_dpos = tl.zeros([BLOCK_R, BLOCK_D], dtype=tl.float32)
    for image in range(i_p, B, parts):
        i_b = image + tl.zeros([BLOCK_R], dtype=tl.int64)
        i_l = o_r
        if IDS:
            i_l = tl.load(ids_ptr + i_b * K + o_r, mask=m_r, other=0).to(tl.int32)
            i_l = tl.minimum(tl.maximum(i_l, 0), L - 1)
        b_dout = tl.load(dout_ptr + (i_b * K + o_r)[:, None] * D + o_d[None, :], mask=tile, other=0.0)
        b_x = _patches(x_ptr, i_b, i_l, o_j, m_r, C, G, p).to(b_dout.dtype)
        b_dweight += tl.dot(b_dout.trans(), b_x, input_precision="ieee")
        b_dpos += b_dout.to(tl.float32)
    i_part = (i_r * parts + i_p).to(tl.int64)
    p_dweight = dweight_ptr + (i_part * D + o_d)[:, None] * P + o_j[None, :]
    tl.store(p_dweight, b_dweight, mask=m_d[:, None] & (o_j < P)[None, :])
    if i_j == 0:
        tl.store(dbias_ptr + i_part * D + o_d, tl.sum(b_dpos, axis=0), mask=m_d)
        if not IDS:
            p_dpos = dpos_ptr + (i_p.to(tl.int64) * L + o_r)[:, None] * D + o_d[None, :]
            tl.store(p_dpos, b_dpos, mask=tile)
