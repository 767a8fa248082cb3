"""The arguments of one attention call, apart from the tensors that carry gradients."""

from typing import NamedTuple

from torch import Tensor


class Side(NamedTuple):
    """Layout of the queries or keys.

    ``pos`` are the grid positions [B, length] or [R], or None for the whole grid in order. ``length`` is the
    number of tokens per sample. For a ragged batch, ``offsets`` are the cumulative sequence lengths (int32
    [B + 1]), and ``length`` bounds the longest sample.
    """

    pos: Tensor | None
    offsets: Tensor | None
    length: int
    batch: int


class Call(NamedTuple):
    """Both sides, G, the factor of q k^T, and the variants of the Triton kernels (see ``config.py``)."""

    queries: Side
    keys: Side
    grid_size: int
    scale: float
    bias_form: str = "lookup"
    table_grad: str = "recompute"

    @property
    def ragged(self) -> bool:
        return self.queries.offsets is not None
