"""adaLN: layer norm and modulation, optionally after a gated residual and before a linear layer."""

from .linear import gate_residual_ln_modulate_linear, ln_modulate_linear, residual_ln_modulate_linear
from .op import gate_residual, gate_residual_ln_modulate, ln_modulate

__all__ = [
    "gate_residual",
    "gate_residual_ln_modulate",
    "gate_residual_ln_modulate_linear",
    "ln_modulate",
    "ln_modulate_linear",
    "residual_ln_modulate_linear",
]
