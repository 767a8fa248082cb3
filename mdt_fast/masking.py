"""Masks: the only module that draws them.

A :class:`MaskPlan` says which tokens of each sample the encoder sees in the masked pass. Shapes:
B samples, L tokens, K kept tokens.
"""

from dataclasses import dataclass, replace
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from .config import RATIO_RANGE
from .errors import UserError
from .kernels import mask_plan
from .kernels.checks import is_integer, readable

TENSORS = ("ids_keep", "ids_mask", "ids_restore", "mask")


@dataclass(frozen=True, eq=False)
class MaskPlan:
    """Which tokens of each sample in a batch are kept.

    ``ids_keep`` [B, K] and ``ids_mask`` [B, L-K] (int64) are the indices of the kept and dropped tokens.
    ``ids_restore`` [B, L] (int64) is each token's position in ``cat([ids_keep, ids_mask])``. ``mask`` [B, L]
    (float32) is 0 for kept tokens and 1 for dropped ones. ``ascending``: both index lists are in ascending
    order (False: perhaps not).
    """

    ids_keep: Tensor
    ids_mask: Tensor
    ids_restore: Tensor
    mask: Tensor
    ascending: bool = False

    @classmethod
    def draw(
        cls,
        batch: int,
        num_tokens: int,
        mask_ratio: float,
        *,
        random_ratio: bool,
        device: torch.device | str | None = None,
        ascending: bool = False,
    ) -> "MaskPlan":
        """Draw a plan as the official model does: the ratio (MDTv2 only), then one noise value per token.

        Both come from torch's default generators, in that order. The ratio is always drawn on the host, so
        that nothing waits for a device; the noise is drawn on ``device``. ``ascending``: see
        :meth:`from_noise`.
        """
        for name, count in (("batch", batch), ("num_tokens", num_tokens)):
            _check_count(name, count)
        if not isinstance(mask_ratio, Real | Tensor) or not 0 <= mask_ratio <= 1:
            raise UserError(f"mask_ratio: got {mask_ratio!r}, expected 0..1")
        len_keep = (
            draw_len_keep(num_tokens, mask_ratio) if random_ratio else int(num_tokens * (1 - mask_ratio))
        )
        noise = torch.rand(batch, num_tokens, dtype=torch.float32, device=device)  # half types have ties
        return cls.from_noise(noise, len_keep, ascending=ascending)

    @classmethod
    def from_noise(cls, noise: Tensor, len_keep: int, *, ascending: bool = False) -> "MaskPlan":
        """Keep the ``len_keep`` tokens with the smallest noise; ``noise`` is [B, L], of any float dtype.

        Tokens are ordered by their noise (the official order), or by their index with ``ascending``, in one
        step (``kernels.mask_plan``) that gives what :meth:`sorted` would. Equal noise is ordered by token
        index. Raises ``UserError`` for noise that is not [B, L] or contains NaN (checked on the CPU only),
        and for a ``len_keep`` that is not an integer in 0..L.
        """
        _check_count("len_keep", len_keep)
        if not isinstance(noise, Tensor):
            raise UserError(f"noise: got {_named(noise)}, expected floats [batch, tokens]")
        if noise.ndim != 2 or not noise.is_floating_point():
            raise UserError(f"noise: got {noise.dtype} {list(noise.shape)}, expected floats [batch, tokens]")
        if readable(noise) and noise.isnan().any():
            raise UserError("noise: has NaN values; expected ordinary numbers")
        if len_keep > noise.shape[1]:
            raise UserError(f"len_keep: got {len_keep}, expected 0..{noise.shape[1]}")
        if ascending:
            return replace(cls(*mask_plan(noise, len_keep)), ascending=True)
        ids_shuffle = torch.argsort(noise, dim=1, stable=True)
        return cls._from_ids(ids_shuffle[:, :len_keep], ids_shuffle[:, len_keep:])

    @classmethod
    def from_keep(cls, ids_keep: Tensor, num_tokens: int) -> "MaskPlan":
        """The plan that keeps ``ids_keep`` [B, K] (int64, distinct within a row, 0..num_tokens-1)."""
        if not isinstance(ids_keep, Tensor) or ids_keep.ndim != 2 or ids_keep.dtype != torch.int64:
            raise UserError(f"ids_keep: got {_named(ids_keep)}, expected int64 [batch, kept]")
        _check_count("num_tokens", num_tokens)
        if ids_keep.numel() and (ids_keep.min() < 0 or ids_keep.max() >= num_tokens):
            low, high = int(ids_keep.min()), int(ids_keep.max())
            raise UserError(f"ids_keep: values {low}..{high}, expected 0..{num_tokens - 1}")
        kept = torch.zeros(ids_keep.shape[0], num_tokens, dtype=torch.int64, device=ids_keep.device)
        kept.scatter_add_(1, ids_keep, torch.ones_like(ids_keep))
        if (kept > 1).any():
            raise UserError("ids_keep: a row has the same token number twice; expected once")
        ids_mask = torch.argsort(kept, dim=1, stable=True)[:, : num_tokens - ids_keep.shape[1]]
        return cls._from_ids(ids_keep, ids_mask)

    @classmethod
    def from_mask(cls, mask: Tensor) -> "MaskPlan":
        """The plan that drops the tokens where ``mask`` [B, L] (bool) is True, in ascending order.

        Raises ``UserError`` unless every sample drops the same number of tokens; checking this waits for a
        GPU.
        """
        if not isinstance(mask, Tensor) or mask.ndim != 2 or mask.dtype != torch.bool:
            raise UserError(f"mask: got {_named(mask)}, expected bool [batch, tokens]")
        dropped = mask.sum(dim=1).tolist() or [0]
        if min(dropped) != max(dropped):
            raise UserError(
                f"mask: drops {min(dropped)} to {max(dropped)} tokens of a sample; "
                "expected the same number for every sample"
            )
        ids = mask.byte().argsort(dim=1, stable=True)
        len_keep = mask.shape[1] - dropped[0]
        return replace(cls._from_ids(ids[:, :len_keep], ids[:, len_keep:]), ascending=True)

    @classmethod
    def _from_ids(cls, ids_keep: Tensor, ids_mask: Tensor) -> "MaskPlan":
        ids_restore = torch.argsort(torch.cat([ids_keep, ids_mask], dim=1), dim=1)
        return cls(ids_keep, ids_mask, ids_restore, (ids_restore >= ids_keep.shape[1]).float())

    def sorted(self) -> "MaskPlan":
        """The plan with the same tokens, in ascending order.

        Everything between gather and scatter is token-wise or attention, so the order affects only rounding.
        Ascending order makes gathers and bias look-ups nearly contiguous.
        """
        if self.ascending:
            return self
        plan = self._from_ids(self.ids_keep.sort(dim=1).values, self.ids_mask.sort(dim=1).values)
        return replace(plan, ascending=True)

    @property
    def batch(self) -> int:
        return self.ids_restore.shape[0]

    @property
    def num_tokens(self) -> int:
        return self.ids_restore.shape[1]

    @property
    def len_keep(self) -> int:
        """K: the number of tokens per sample that the encoder sees."""
        return self.ids_keep.shape[1]

    def check(self, batch: int, num_tokens: int, device: torch.device) -> None:
        """Raise ``UserError`` unless the plan fits ``batch`` samples of ``num_tokens`` on ``device``."""
        if (self.batch, self.num_tokens) != (batch, num_tokens):
            raise UserError(
                f"mask_plan: is for {self.batch} samples of {self.num_tokens} tokens, "
                f"the input has {batch} of {num_tokens}"
            )
        if self.ids_keep.device != device:
            raise UserError(f"mask_plan: is on {self.ids_keep.device}, the input is on {device}")

    def to(self, device: torch.device | str) -> "MaskPlan":
        """The plan on another device."""
        return replace(self, **{name: getattr(self, name).to(device) for name in TENSORS})

    def twice(self) -> "MaskPlan":
        """The plan repeated for a second copy of the samples, as guidance needs it."""
        both: Any = {name: torch.cat([getattr(self, name)] * 2) for name in TENSORS}
        return replace(self, **both)

    def rows(self, rows: slice) -> "MaskPlan":
        """The plan of some of the samples."""
        return replace(self, **{name: getattr(self, name)[rows] for name in TENSORS})


def _check_count(name: str, value: Any) -> None:
    traced = isinstance(value, Tensor)  # a size in a program that torch.jit traces
    if not (is_integer(value) or traced) or value < 0:
        raise UserError(f"{name}: got {value!r}, expected an integer of 0 or more")


def _named(value: object) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"


def len_keeps(num_tokens: int, mask_ratio: float) -> range:
    """All values that :func:`draw_len_keep` can return, ascending."""
    ratios = torch.tensor([1.0, 0.0], dtype=torch.float32, device="cpu") * RATIO_RANGE + mask_ratio
    least, most = (int(num_tokens * (1 - ratio)) for ratio in ratios)
    return range(least, most + 1)


def draw_len_keep(num_tokens: int, mask_ratio: float, generator: torch.Generator | None = None) -> int:
    """Draw MDTv2's number of kept tokens: one uniform draw for the whole batch (float32, truncated).

    With 256 tokens and ``mask_ratio`` 0.3 the result is in 128..179. ``generator``: a CPU generator; None:
    torch's default one. Processes that share a batch get the same number from generators with the same seed.
    Raises ``UserError`` for a ``mask_ratio`` from which a draw could go beyond 1.
    """
    if not 0 <= mask_ratio <= 1 - RATIO_RANGE:
        raise UserError(
            f"mask_ratio: got {mask_ratio!r}, expected 0..{1 - RATIO_RANGE}; up to {RATIO_RANGE} is added"
        )
    ratio = torch.rand(1, generator=generator, dtype=torch.float32, device="cpu") * RATIO_RANGE + mask_ratio
    return int(num_tokens * (1 - ratio))
