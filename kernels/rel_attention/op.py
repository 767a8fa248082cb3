"""Checks and dispatch. B samples, H heads, M queries, N keys, d head size, G grid side."""

from torch import Tensor

from .. import checks
from . import reference


def rel_attention(
    q_BHMd: Tensor,
    k_BHNd: Tensor,
    v_BHNd: Tensor,
    table_RH: Tensor | None = None,
    *,
    grid_size: int = 0,
    q_pos: Tensor | None = None,
    k_pos: Tensor | None = None,
) -> Tensor:
    """``softmax(q k^T / sqrt(d) + bias) v`` with ``bias`` read from a table by relative position.

    ``q`` [B, H, M, d], ``k`` and ``v`` [B, H, N, d], one floating dtype; returns [B, H, M, d].
    ``table`` [(2G-1)^2 + 3, H], or None for no bias; its last three rows are never read. ``q_pos`` [B, M] and
    ``k_pos`` [B, N] (int64, 0..G*G-1) say which of the G*G grid positions each token stands at; without
    them it is all positions in order. Raises ``ValueError`` for shapes, dtypes or devices that do not fit,
    and (on the CPU) positions out of the grid.

    Source: MDT (arXiv:2303.14389), section 3; the table's form is BEiT's (arXiv:2106.08254).
    """
    checks.floating("q", q_BHMd)
    checks.shape("q", q_BHMd, "B", "H", "M", "d")
    B, H, M, d = q_BHMd.shape
    checks.shape("k", k_BHNd, B, H, "N", d)
    N = k_BHNd.shape[2]
    checks.shape("v", v_BHNd, B, H, N, d)
    for name, x in (("k", k_BHNd), ("v", v_BHNd)):
        checks.alike(name, x, "q", q_BHMd)
    if table_RH is not None:
        if grid_size < 1:
            raise ValueError(f"grid_size: got {grid_size}, a table needs 1 or more")
        checks.floating_on("table", table_RH, q_BHMd)
        checks.shape("table", table_RH, (2 * grid_size - 1) ** 2 + 3, H)
        for name, pos, length in (("q_pos", q_pos, M), ("k_pos", k_pos, N)):
            if pos is not None:
                checks.shape(name, pos, B, length)
                checks.token_ids(name, pos, grid_size**2, q_BHMd)
            elif length != grid_size**2:
                raise ValueError(f"{name}: needed for {length} tokens (a whole grid has {grid_size**2})")
    return reference.rel_attention(q_BHMd, k_BHNd, v_BHNd, table_RH, grid_size, q_pos, k_pos)
