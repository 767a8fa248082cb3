"""FLOP formulas of the registered products for torch's ``FlopCounterMode``; import this module to use them.

It is a separate module because torch's counter imports Triton, which ``import mdt_fast`` does not.
"""

from math import prod

import torch
from torch.utils.flop_counter import flop_registry, register_flop_formula

from ..float8 import registered as registered  # registers the ops
from . import onednn as onednn


@register_flop_formula([torch.ops.mdt_fast.linear, torch.ops.mdt_fast.linear_gelu])
def _(x_shape, weight_shape, *_, **__):  # type: ignore[no-untyped-def]
    return 2 * prod(x_shape) * weight_shape[0]


@register_flop_formula(torch.ops.mdt_fast.linear_bwd)
def _(dout_shape, x_shape, weight_shape, needs_x, needs_weight, **_):  # type: ignore[no-untyped-def]
    return (needs_x + needs_weight) * 2 * prod(x_shape) * weight_shape[0]


@register_flop_formula(torch.ops.mdt_fast.weight_gradient)
def _(dout_shape, x_shape, **_):  # type: ignore[no-untyped-def]
    return 2 * prod(dout_shape) * x_shape[1]


@register_flop_formula(torch.ops.mdt_fast.multiply_float8)
def _(x_shape, _scale_shape, weight_shape, *_, **__):  # type: ignore[no-untyped-def]
    return 2 * prod(x_shape) * weight_shape[0]


def _addmm_activation(bias_shape, x_shape, weight_shape, *_, **__):  # type: ignore[no-untyped-def]
    return 2 * prod(x_shape) * weight_shape[1]


if torch.ops.aten._addmm_activation not in flop_registry:  # torch's own op, for which it has no formula
    register_flop_formula(torch.ops.aten._addmm_activation)(_addmm_activation)
