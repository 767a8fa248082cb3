"""Attention on a CPU, sample by sample: the scores of a sample fit into the cache, those of a batch do not.

``csrc/`` computes it. PyTorch does, a few samples at a time, for float64, and if ``csrc/`` is not built or
its vectors on this processor are narrower than 256 bits.

B samples, H heads, M queries, N keys, d head size, T table rows, n samples of a group. q, k, v and their
gradients are strided [B, H, rows, d], or [1, H, all rows, d] with offsets. Softmax, sums and the table's
gradient are float32 (float64 for float64); PyTorch's products have the dtype of q.
"""

from torch import Tensor

from ..backends import WITH_CPP, uses_csrc
from ..native import vector_bits
from . import native
from .call import Call
from .groups import groups, wide
from .scores import Scores

SCORES_BYTES = 1 << 20
"""Most bytes of a group's scores: about what a core's private cache holds."""


def by_csrc(q: Tensor) -> bool:
    """Whether ``csrc/`` computes attention for queries like these."""
    return uses_csrc(q) and vector_bits() >= WITH_CPP["rel_attention"]


def forward(
    q_BHMd: Tensor, k_BHNd: Tensor, v_BHNd: Tensor, table_RH: Tensor | None, call: Call, out_BHMd: Tensor
) -> Tensor:
    """Write ``out``; returns log(sum(exp(score))) [H, all rows of q]."""
    lse = q_BHMd.new_empty(q_BHMd.shape[1], q_BHMd.shape[0] * q_BHMd.shape[2], dtype=wide(q_BHMd))
    if by_csrc(q_BHMd):
        native.forward(q_BHMd, k_BHNd, v_BHNd, table_RH, call, out_BHMd, lse)
        return lse
    scores = Scores(table_RH, call, q_BHMd, with_gradient=False)
    for group in groups(q_BHMd, k_BHNd, call, SCORES_BYTES):
        out = group.q.of(out_BHMd)
        if not group.q.length or not group.k.length:
            out.zero_()
            continue
        q, k, v = group.q.of(q_BHMd), group.k.of(k_BHNd), group.k.of(v_BHNd)
        scores.attend(group, q, k, v, out, group.q.of_all(lse))
    return lse


def backward(
    dout_BHMd: Tensor,
    q_BHMd: Tensor,
    k_BHNd: Tensor,
    v_BHNd: Tensor,
    table_RH: Tensor | None,
    out_BHMd: Tensor,
    lse: Tensor,
    call: Call,
    dq_BHMd: Tensor,
    dk_BHNd: Tensor,
    dv_BHNd: Tensor,
    dtable_RH: Tensor | None,
) -> None:
    """Write the gradients of q, k and v, and that of the table if ``dtable`` (initially zeros) is given."""
    if by_csrc(q_BHMd):
        native.backward(
            dout_BHMd, q_BHMd, k_BHNd, v_BHNd, table_RH, lse, call, dq_BHMd, dk_BHNd, dv_BHNd, dtable_RH
        )
        return
    scores = Scores(table_RH, call, q_BHMd, with_gradient=dtable_RH is not None)
    for group in groups(q_BHMd, k_BHNd, call, SCORES_BYTES):
        dq, dk, dv = group.q.of(dq_BHMd), group.k.of(dk_BHNd), group.k.of(dv_BHNd)
        if not group.q.length or not group.k.length:
            for gradient in (dq, dk, dv):
                gradient.zero_()
            continue
        queries = group.q.of(q_BHMd), group.q.of(dout_BHMd), group.q.of(out_BHMd), group.q.of_all(lse)
        scores.differentiate(group, *queries, group.k.of(k_BHNd), group.k.of(v_BHNd), dq, dk, dv)
    if dtable_RH is not None:
        dtable_RH.copy_(scores.table_gradient())
