"""FLOP formulas of all registered ops for torch's ``FlopCounterMode``.

They are in modules of their own because torch's counter imports Triton, which ``import mdt_fast`` does not.
An op that a counter sees brings them with it (:func:`counted`).
"""

from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from torch.utils.flop_counter import _FlopCounterMode, flop_registry

from .linear import flops as linear
from .rel_attention import flops as rel_attention

__all__ = ["counted", "linear", "rel_attention"]


def counted() -> None:
    """Give the formulas to the counters that are active here, which may have been made before them."""
    for mode in _get_current_dispatch_mode_stack():
        if isinstance(mode, _FlopCounterMode):
            known = mode.counter.flop_registry
            known.update({op: rule for op, rule in flop_registry.items() if op not in known})
