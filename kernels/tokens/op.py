"""Argument checks and dispatch. B samples, L tokens, K kept, N masked, D width."""

from torch import Tensor

from .. import checks
from ..backends import uses_triton
from . import reference
from .config import MAX_D


def gather_tokens(x_BLD: Tensor, ids_BK: Tensor, ids_restore_BL: Tensor | None = None) -> Tensor:
    """Gather the tokens ``ids`` (int64 [B, K], 0..L-1) of ``x`` [B, L, D]; returns [B, K, D].

    ``ids`` may repeat. If they do not, ``ids_restore`` (int64 [B, L], each token's index in
    ``cat([kept, masked])``) spares the backward pass a search; it changes no result.

    Raises ``ValueError`` for shapes or dtypes that do not fit, and on the CPU for ids out of range.
    """
    checks.floating("x", x_BLD)
    checks.shape("x", x_BLD, "B", "L", "D")
    B, L, D = x_BLD.shape
    checks.shape("ids", ids_BK, B, "K")
    checks.token_ids("ids", ids_BK, L, x_BLD)
    if ids_restore_BL is not None:
        checks.shape("ids_restore", ids_restore_BL, B, L)
        checks.token_ids("ids_restore", ids_restore_BL, L, x_BLD)
    if not uses_triton(x_BLD):
        return reference.gather_tokens(x_BLD, ids_BK)
    _check_width(D)
    from .move_op import gather_tokens_fwd  # not at the top: not every machine has Triton

    restore = None if ids_restore_BL is None else ids_restore_BL.contiguous()
    return gather_tokens_fwd(x_BLD.contiguous(), ids_BK.contiguous(), restore)


def merge_tokens(x_BLD: Tensor, computed_BND: Tensor, ids_restore_BL: Tensor) -> Tensor:
    """Replace the masked tokens of ``x`` by the ``computed`` ones; returns [B, L, D].

    ``x`` is [B, L, D]. ``computed`` [B, N, D] holds the N = L - K masked tokens in the order of ``ids_mask``.
    ``ids_restore`` (int64 [B, L]) is each token's index in ``cat([kept, masked])``. ``x`` and ``computed``
    share one floating dtype.

    Raises ``ValueError`` for shapes or dtypes that do not fit, and on the CPU for ids out of range.
    """
    checks.floating("x", x_BLD)
    checks.shape("x", x_BLD, "B", "L", "D")
    B, L, D = x_BLD.shape
    checks.shape("computed", computed_BND, B, "N", D)
    checks.alike("computed", computed_BND, "x", x_BLD)
    if computed_BND.shape[1] > L:
        raise ValueError(f"computed: {computed_BND.shape[1]} tokens, but x has only {L}")
    checks.shape("ids_restore", ids_restore_BL, B, L)
    checks.token_ids("ids_restore", ids_restore_BL, L, x_BLD)
    if not uses_triton(x_BLD):
        return reference.merge_tokens(x_BLD, computed_BND, ids_restore_BL)
    _check_width(D)
    from .move_op import merge_tokens_fwd

    return merge_tokens_fwd(*(a.contiguous() for a in (x_BLD, computed_BND, ids_restore_BL)))


def unmask_tokens(x_BKD: Tensor, mask_token_11D: Tensor, pos_1LD: Tensor, ids_restore_BL: Tensor) -> Tensor:
    """Scatter the kept tokens to their places, fill the rest with the mask token, and add the position
    embedding.

    ``x`` is [B, K, D], ``mask_token`` [1, 1, D] and ``pos`` [1, L, D]. ``ids_restore`` (int64 [B, L]) is each
    token's index in ``cat([kept, masked])``. The result is [B, L, D] in the dtype of ``x``.

    Raises ``ValueError`` for shapes or dtypes that do not fit, and on the CPU for ids out of range.
    """
    checks.floating("x", x_BKD)
    checks.shape("x", x_BKD, "B", "K", "D")
    B, K, D = x_BKD.shape
    checks.shape("mask_token", mask_token_11D, 1, 1, D)
    checks.shape("ids_restore", ids_restore_BL, B, "L")
    L = ids_restore_BL.shape[1]
    if K > L:
        raise ValueError(f"x: {K} kept tokens, but ids_restore places only {L}")
    checks.shape("pos", pos_1LD, 1, L, D)
    checks.token_ids("ids_restore", ids_restore_BL, L, x_BKD)
    for name, parameter in (("mask_token", mask_token_11D), ("pos", pos_1LD)):
        checks.floating_on(name, parameter, x_BKD)
    if not uses_triton(x_BKD):
        return reference.unmask_tokens(x_BKD, mask_token_11D, pos_1LD, ids_restore_BL)
    _check_width(D)
    from .triton_op import unmask_tokens_fwd

    return unmask_tokens_fwd(*(a.contiguous() for a in (x_BKD, mask_token_11D, pos_1LD, ids_restore_BL)))


def _check_width(D: int) -> None:
    if D > MAX_D:
        raise ValueError(f"x: width {D}, the Triton kernel takes at most {MAX_D}")
