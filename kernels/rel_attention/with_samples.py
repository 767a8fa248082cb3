"""Attention on a CPU by ``samples.py``: table gradients without storing all scores, and ragged batches."""

from torch import Tensor

from .. import checks
from .call import Call
from .samples import by_csrc
from .with_triton import attend, attend_packed

__all__ = ["attend", "attend_packed", "better", "refusal"]


def refusal(q: Tensor, table_RH: Tensor | None, call: Call, needs_grad: bool) -> str | None:
    if q.device.type != "cpu":
        return f"it serves the CPU; got {q.device}"
    if checks.plain_only():
        return "it cannot be transformed by torch.func, nor differentiated forwards, nor exported"
    return None


def better(q: Tensor, table_RH: Tensor | None, call: Call, needs_grad: bool) -> bool:
    """Whether it beats PyTorch's fused attention: always for what that lacks, the table's gradient and ragged
    batches; otherwise if ``csrc/`` serves."""
    if refusal(q, table_RH, call, needs_grad) is not None:
        return False
    if call.ragged or (needs_grad and table_RH is not None and table_RH.requires_grad):
        return True
    return by_csrc(q)
