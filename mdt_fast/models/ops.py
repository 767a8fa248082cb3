"""adaLN and the linear layer after it: by the kernels, or in plain PyTorch with ``fused`` False.

x [B, L, D], or packed rows [R, D] with ``offsets``; modulations [B, D]. ``recompute``: the kernels keep no
normalised activations for the backward pass.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels import (
    gate_residual,
    gate_residual_ln_modulate,
    gate_residual_ln_modulate_linear,
    linear,
    ln_modulate,
    ln_modulate_linear,
    residual_ln_modulate_linear,
)
from ..kernels.linear.op import Float8
from ..kernels.ln_modulate import reference
from .own import is_itself, is_readable, known, plain_parameters

EPS = 1e-6


@known
class Float8Linear(nn.Linear):
    """A linear layer with float8 products, except the one for its weight's gradient (see ``float8.py``).

    ``rounded``: the weight's float8 rows and scales, set only while the weight is known not to change.
    """

    rounded: tuple[Tensor, Tensor] | None = None

    def forward(self, input: Tensor) -> Tensor:  # PyTorch's name for the argument
        if not is_readable(self.weight):  # quantised since then
            return super().forward(input)
        return linear(input, self.weight, self.bias, float8=in_float8(self))


def in_float8(layer: nn.Module) -> Float8:
    """Whether this package multiplies ``layer`` in float8; or its rounded weight, if there is one."""
    if type(layer) is not Float8Linear:
        return False
    return True if layer.rounded is None else layer.rounded


def takes_activated(modulation: nn.Module) -> bool:
    """Whether ``modulation`` is SiLU and one layer, so that the conditioning is activated once for all."""
    parts = [*vars(modulation)["_modules"].values()]
    return is_itself(modulation, nn.Sequential) and len(parts) == 2 and is_itself(parts[0], nn.SiLU)


def modulation_from(modulation: nn.Module, c: Tensor, activated: Tensor | None = None) -> Tensor:
    """The modulation from c [B, D]; ``activated``: SiLU of c, if already computed."""
    if activated is None or not takes_activated(modulation):
        result: Tensor = modulation(c)
        return result
    _, layer = vars(modulation)["_modules"].values()
    return apply_linear(layer, activated)


def apply_linear(layer: nn.Module, x: Tensor) -> Tensor:
    """Apply ``layer`` to x."""
    plain = plain_parameters(layer)
    return layer(x) if plain is None else linear(x, *plain, float8=in_float8(layer))


def norm(x: Tensor, shift: Tensor, scale: Tensor, offsets: Tensor | None, fused: bool) -> Tensor:
    """The modulated norm of x."""
    if fused:
        return ln_modulate(x, shift, scale, offsets=offsets, eps=EPS)
    return reference.ln_modulate(x, shift, scale, offsets, EPS)


def norm_linear(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    layer: nn.Linear,
    *,
    offsets: Tensor | None,
    fused: bool,
    recompute: bool,
    outputs: slice | None = None,
) -> Tensor:
    """Apply ``layer`` to the modulated norm of x; ``outputs`` selects some of its outputs."""
    plain, float8 = _part(plain_parameters(layer), outputs), in_float8(layer)
    if outputs is not None and isinstance(float8, tuple):
        float8 = float8[0][outputs], float8[1][outputs]
    if fused and plain is not None:
        return ln_modulate_linear(
            x, shift, scale, *plain, offsets=offsets, eps=EPS, recompute=recompute, float8=float8
        )
    normal = norm(x, shift, scale, offsets, fused)
    if plain is not None:
        return linear(normal, *plain, float8=float8)
    return layer(normal) if outputs is None else layer(normal)[..., outputs]


def residual_norm_linear(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    layer: nn.Linear,
    *,
    offsets: Tensor | None,
    fused: bool,
    recompute: bool,
) -> tuple[Tensor, Tensor]:
    """Return x as the residual to continue with, and ``layer`` applied to the modulated norm of x."""
    if fused and (plain := plain_parameters(layer)) is not None:
        return residual_ln_modulate_linear(
            x, shift, scale, *plain, offsets=offsets, eps=EPS, recompute=recompute, float8=in_float8(layer)
        )
    return x, norm_linear(x, shift, scale, layer, offsets=offsets, fused=fused, recompute=recompute)


def _part(plain: tuple[Tensor, Tensor] | None, outputs: slice | None) -> tuple[Tensor, Tensor] | None:
    """A part of weight and bias; whole ones are returned as they are, as a slice's gradient is a copy."""
    return plain if plain is None or outputs is None else (plain[0][outputs], plain[1][outputs])


def gated_norm_linear(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    layer: nn.Module,
    *,
    offsets: Tensor | None,
    fused: bool,
    recompute: bool,
    with_bias: bool = True,
    gelu: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return ``r = x + gate * y``, and ``layer`` applied to the modulated norm of r (for a plain layer,
    optionally without its bias; optionally followed by GELU)."""
    plain, float8 = plain_parameters(layer), in_float8(layer)
    if fused and plain is not None:
        weight, bias = plain
        return gate_residual_ln_modulate_linear(
            x, y, gate, shift, scale, weight, bias if with_bias else None,
            offsets=offsets, eps=EPS, recompute=recompute, gelu=gelu, float8=float8,
        )  # fmt: skip
    r, normal = (
        gate_residual_ln_modulate(x, y, gate, shift, scale, offsets=offsets, eps=EPS)
        if fused
        else reference.gate_residual_ln_modulate(x, y, gate, shift, scale, offsets, EPS)
    )
    out = (
        apply_linear(layer, normal) if plain is None or with_bias else linear(normal, plain[0], float8=float8)
    )
    return r, F.gelu(out, approximate="tanh") if gelu else out


def gated(x: Tensor, y: Tensor, gate: Tensor, *, offsets: Tensor | None, fused: bool) -> Tensor:
    """``x + gate * y``."""
    if fused:
        return gate_residual(x, y, gate, offsets=offsets)
    return reference.gate_residual(x, y, gate, offsets)
