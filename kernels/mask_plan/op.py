"""Argument checks and dispatch: the op of ``csrc/`` if it was built, else PyTorch."""

from typing import NamedTuple

import torch
from torch import Tensor

from .. import checks
from ..native import library
from . import reference

MOST_TOKENS_ON_CUDA = 4096


class MaskIds(NamedTuple):
    """The tokens that a mask keeps and drops. B samples, L tokens, K kept; int64 except for ``mask``.

    ``ids_keep`` [B, K] and ``ids_mask`` [B, L-K] are the indices of the kept and dropped tokens, ascending.
    ``ids_restore`` [B, L] is each token's index in ``cat([ids_keep, ids_mask])``.
    ``mask`` [B, L] (float32) is 0 for kept tokens and 1 for dropped ones.
    """

    ids_keep: Tensor
    ids_mask: Tensor
    ids_restore: Tensor
    mask: Tensor


def mask_plan(noise: Tensor, len_keep: int) -> MaskIds:
    """Keep the ``len_keep`` tokens with the smallest noise in each row of ``noise`` [B, L] (any float dtype).

    The kept tokens are those of ``argsort(noise, stable=True)[:, :len_keep]``: ties go to the lower token
    index, and -0 equals 0. There are no gradients. On CUDA one launch serves the batch for up to 4096 tokens
    (beyond that, PyTorch sorts twice), and NaN counts as the largest value.

    Raises ``ValueError`` if ``noise`` is not a floating [B, L] tensor, if it has NaN (on the CPU), or if
    ``len_keep`` is outside 0..L.
    """
    checks.tensor("noise", noise)
    if noise.ndim != 2 or not noise.is_floating_point():
        raise ValueError(f"noise: {noise.dtype} {list(noise.shape)}, expected floating-point [B, L]")
    if not checks.is_integer(len_keep):
        raise ValueError(f"len_keep: got {len_keep!r}, expected an integer")
    if not 0 <= len_keep <= noise.shape[1]:
        raise ValueError(f"len_keep: got {len_keep}, expected 0..{noise.shape[1]}")
    if checks.readable(noise) and noise.isnan().any():
        raise ValueError("noise: has NaN values; expected ordinary numbers")
    noise = noise.detach()
    fits = noise.device.type != "cuda" or noise.shape[1] <= MOST_TOKENS_ON_CUDA
    if not fits or not library(noise.device.type) or checks.plain_only():
        return MaskIds(*reference.mask_plan(noise, len_keep))
    if noise.dtype != torch.float64:
        noise = noise.float()  # exact, so the order stays the same
    return MaskIds(*torch.ops.mdt_fast.mask_plan(noise.contiguous(), len_keep))


if library("cpu"):

    @torch.library.register_fake("mdt_fast::mask_plan")
    def _(noise: Tensor, len_keep: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        B, L = noise.shape
        ids_keep, ids_mask, ids_restore = (
            noise.new_empty((B, n), dtype=torch.int64) for n in (len_keep, L - len_keep, L)
        )
        return ids_keep, ids_mask, ids_restore, noise.new_empty((B, L), dtype=torch.float32)
