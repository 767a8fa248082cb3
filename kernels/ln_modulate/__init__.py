"""adaLN: layer norm and modulation, alone or behind a gated residual."""

from .op import gate_residual_ln_modulate, ln_modulate

__all__ = ["gate_residual_ln_modulate", "ln_modulate"]
