"""What one call of attention is about, apart from the tensors that carry gradients."""

from typing import NamedTuple

from torch import Tensor


class Side(NamedTuple):
    """Where queries or keys stand: ``pos`` [B, length] or [R], or None for the whole grid in order; with
    ``offsets`` (int32 [B + 1]) samples differ in length, and the longest has ``length`` tokens at most."""

    pos: Tensor | None
    offsets: Tensor | None
    length: int
    batch: int


class Call(NamedTuple):
    """Both sides, G, the factor of q k^T, and the Triton kernels' ways (``config.py``)."""

    queries: Side
    keys: Side
    grid_size: int
    scale: float
    bias_form: str = "lookup"
    table_grad: str = "recompute"

    @property
    def ragged(self) -> bool:
        return self.queries.offsets is not None
