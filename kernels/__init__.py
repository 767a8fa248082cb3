"""The operations of MDT and DiT, one package each, for use in your own models.

Every package has a plain PyTorch ``reference.py`` that serves any device. :func:`backends` says what serves
each op on this machine, and why.
"""

from .backends import Backend, backends
from .bias_gelu import bias_gelu, gelu_linear
from .cfg_step import cfg_step, ddim_coefficients, ddpm_coefficients
from .float8 import quantize_rows, quantize_weight
from .linear import linear
from .ln_modulate import (
    gate_residual,
    gate_residual_ln_modulate,
    gate_residual_ln_modulate_linear,
    ln_modulate,
    ln_modulate_linear,
    residual_ln_modulate_linear,
)
from .mask_plan import MaskIds, mask_plan
from .optim import adamw_step, adan_step, grad_norm, grad_sumsq
from .patch_embed import patch_embed
from .rel_attention import attention_backends, rel_attention, rel_attention_qkvpacked, relative_bias
from .skip_linear import patch_skip_linear, skip_linear
from .sums import sum_rows
from .tokens import gather_tokens, merge_tokens, unmask_tokens

__all__ = [
    "Backend",
    "MaskIds",
    "adamw_step",
    "adan_step",
    "attention_backends",
    "backends",
    "bias_gelu",
    "cfg_step",
    "ddim_coefficients",
    "ddpm_coefficients",
    "gate_residual",
    "gate_residual_ln_modulate",
    "gate_residual_ln_modulate_linear",
    "gather_tokens",
    "gelu_linear",
    "grad_norm",
    "grad_sumsq",
    "linear",
    "ln_modulate",
    "ln_modulate_linear",
    "mask_plan",
    "merge_tokens",
    "patch_embed",
    "patch_skip_linear",
    "quantize_rows",
    "quantize_weight",
    "rel_attention",
    "rel_attention_qkvpacked",
    "relative_bias",
    "residual_ln_modulate_linear",
    "skip_linear",
    "sum_rows",
    "unmask_tokens",
]
