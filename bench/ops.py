"""The ops of the kernel rooms at the published shapes, with arguments, least bytes and FLOPs as in their
READMEs.

B: samples, L: tokens, K: tokens kept, D: width, C: channels, p: patch side, s: bytes per element.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

import points
from mdt_fast import kernels
from mdt_fast.kernels.backends import INTERPRETING, backends
from mdt_fast.kernels.bias_gelu import reference as plain_gelu
from mdt_fast.kernels.cfg_step import reference as plain_cfg
from mdt_fast.kernels.float8 import reference as plain_float8
from mdt_fast.kernels.float8.registered import multiplies
from mdt_fast.kernels.ln_modulate import reference as plain_ln
from mdt_fast.kernels.mask_plan import reference as plain_mask
from mdt_fast.kernels.patch_embed import reference as plain_patch
from mdt_fast.kernels.skip_linear import reference as plain_skip
from mdt_fast.kernels.tokens import reference as plain_tokens
from mdt_fast.masking import MaskPlan
from providers import Skip, compile_obstacle

OURS = ("fast", "eager", "compile")
"""Our op as it dispatches, the room's ``reference.py``, and that reference under ``torch.compile``."""
FLOAT8 = "float8"
"""Our op with its products in float8, if it has any."""
PROVIDERS = (*OURS, FLOAT8, "fused", "timm", "apex")
"""The last three are for optimiser steps only, see ``optimizers.py``."""

WIDTHS = {"S": 384, "B": 768, "L": 1024, "XL": 1152}
TOKENS, KEPT = 256, 153
CHANNELS, PATCH = 4, 2
"""256 x 256 images as latents [4, 32, 32]; K is for the mean mask ratio of 0.4."""


def not_interpreted() -> None:
    """Raise ``Skip`` if Triton kernels would run in the interpreter."""
    if INTERPRETING:
        raise Skip("TRITON_INTERPRET=1: the interpreter is for tests, its times mean nothing")


class Maker:
    """Makes seeded arguments on a device, in a dtype."""

    def __init__(self, device: torch.device, dtype: torch.dtype):
        self.device, self.dtype = device, dtype
        self.generator = torch.Generator(device).manual_seed(0)

    def normal(self, *shape: int, std: float = 1.0, grad: bool = True) -> Tensor:
        values = std * torch.randn(shape, generator=self.generator, device=self.device)
        return values.to(self.dtype).requires_grad_(grad)

    def plan(self, B: int, L: int, K: int) -> MaskPlan:
        """A random mask whose tokens are in ascending order, as in the models."""
        noise = torch.rand(B, L, generator=self.generator, device=self.device)
        return MaskPlan.from_noise(noise, K).sorted()


@dataclass(frozen=True, kw_only=True)
class Op:
    """An op and its cost: ``elements`` is the least it must move, and ``flops`` counts matmuls, each for the
    forward and the backward pass. ``other_bytes`` are moved in addition, in a dtype of their own."""

    name: str
    shape: dict[str, int]
    arguments: Callable[[Maker], tuple[Any, ...]]
    fast: Callable[..., Any]
    eager: Callable[..., Any]
    elements: tuple[int, int]
    other_bytes: int = 0
    flops: tuple[int, int] = (0, 0)
    modes: tuple[points.Mode, ...] = points.MODES
    in_float8: bool = False

    def point(self, mode: points.Mode, dtype: torch.dtype) -> points.Point:
        parts = slice(0, 1 if mode == "fwd" else 2)
        moved = sum(self.elements[parts]) * dtype.itemsize + self.other_bytes
        served = {row.op: row.backend for row in backends()}
        return points.Point(
            bench="kernels", op=self.name, mode=mode, shape=self.shape, dtype=dtype,
            prepare=partial(self.prepare, mode, dtype), base="eager", oracle="eager",
            bytes=moved, flops=sum(self.flops[parts]), roofline=True,
            providers=(*OURS, FLOAT8) if self.in_float8 else OURS,
            switches={
                "fast": {"backend": served[self.name]},
                "compile": {"compile": True},
                FLOAT8: {"float8": True},
            },
        )  # fmt: skip

    def prepare(
        self, mode: points.Mode, dtype: torch.dtype, device: torch.device
    ) -> dict[str, Callable[[], points.Call]]:
        arguments = self.arguments(Maker(device, dtype))

        def fast() -> points.Call:
            not_interpreted()
            return points.call_of(mode, self.fast, arguments)

        def compiled() -> points.Call:
            if reason := compile_obstacle(device):
                raise Skip(reason)
            function = torch.compile(self.eager, fullgraph=True, dynamic=False)
            return points.call_of(mode, function, arguments)

        def float8() -> points.Call:
            if not multiplies(device):
                raise Skip(f"no products in float8 on {device}")
            return points.call_of(mode, partial(self.fast, float8=True), arguments)

        return {
            "fast": fast,
            FLOAT8: float8,
            "eager": lambda: points.call_of(mode, self.eager, arguments),
            "compile": compiled,
        }


def cases(model: str, B: int) -> dict[str, Op]:
    """Every op by name, at the width of ``model`` (a key of ``WIDTHS``) and batch ``B``."""
    D, L, K = WIDTHS[model], TOKENS, KEPT
    ops = (*_rows(B, L, D), *_tokens(B, L, K, D), *_linear(B, L, D), _sampling(B), _masks(B, L, K))
    return {op.name: op for op in ops}


def _rows(B: int, L: int, D: int) -> list[Op]:
    N, F = B * L * D, 4 * D

    def modulation(make: Maker, parts: int) -> tuple[Tensor, ...]:
        # As in a model: views of one wide tensor.
        return make.normal(B, parts * D, grad=False).chunk(parts, dim=1)

    def ln(make: Maker) -> tuple[Any, ...]:
        return make.normal(B, L, D), *(m.requires_grad_() for m in modulation(make, 2))

    def gate_ln(make: Maker) -> tuple[Any, ...]:
        return (
            make.normal(B, L, D),
            make.normal(B, L, D),
            *(m.requires_grad_() for m in modulation(make, 3)),
        )

    def layer(make: Maker, inputs: int, outputs: int) -> tuple[Tensor, Tensor]:
        return make.normal(outputs, inputs, std=inputs**-0.5), make.normal(outputs)

    def plain_gate_linear(x: Any, y: Any, gate: Any, shift: Any, scale: Any, weight: Any, bias: Any) -> Any:
        residual, normal = plain_ln.gate_residual_ln_modulate(x, y, gate, shift, scale, None, 1e-6)
        return residual, linear(normal, weight, bias)

    weight, wide = 3 * D * D, 3 * N
    return [
        Op(
            name="linear", shape={"B": B, "L": L, "D": D, "O": 3 * D}, fast=kernels.linear, eager=linear,
            arguments=lambda make: (make.normal(B, L, D), *layer(make, D, 3 * D)),
            elements=(N + weight + wide, 2 * (N + weight + wide)), flops=(6 * N * D, 12 * N * D),
            in_float8=True,
        ),
        Op(
            name="ln_modulate_linear", shape={"B": B, "L": L, "D": D, "O": 3 * D},
            arguments=lambda make: (*ln(make), *layer(make, D, 3 * D)), fast=kernels.ln_modulate_linear,
            eager=lambda x, shift, scale, weight, bias: linear(
                plain_ln.ln_modulate(x, shift, scale, None, 1e-6), weight, bias
            ),
            elements=(3 * N + weight + wide, 6 * N + 2 * (weight + wide)), flops=(6 * N * D, 12 * N * D),
            in_float8=True,
        ),
        Op(
            name="residual_ln_modulate_linear", shape={"B": B, "L": L, "D": D, "O": 3 * D},
            arguments=lambda make: (*ln(make), *layer(make, D, 3 * D)),
            fast=kernels.residual_ln_modulate_linear,
            eager=lambda x, shift, scale, weight, bias: (
                x, linear(plain_ln.ln_modulate(x, shift, scale, None, 1e-6), weight, bias)
            ),
            elements=(3 * N + weight + wide, 7 * N + 2 * (weight + wide)), flops=(6 * N * D, 12 * N * D),
            in_float8=True,
        ),
        Op(
            name="gate_residual_ln_modulate_linear", shape={"B": B, "L": L, "D": D, "O": 3 * D},
            arguments=lambda make: (*gate_ln(make), *layer(make, D, 3 * D)),
            fast=kernels.gate_residual_ln_modulate_linear, eager=plain_gate_linear,
            elements=(5 * N + weight + wide, 9 * N + 2 * (weight + wide)), flops=(6 * N * D, 12 * N * D),
            in_float8=True,
        ),
        Op(
            name="gate_residual", shape={"B": B, "L": L, "D": D}, arguments=lambda make: gate_ln(make)[:3],
            fast=kernels.gate_residual, eager=partial(plain_ln.gate_residual, offsets=None),
            elements=(3 * N, 3 * N),
        ),
        Op(
            name="gelu_linear", shape={"B": B, "L": L, "F": F, "O": D},
            arguments=lambda make: (make.normal(B, L, F), make.normal(F), *layer(make, F, D)),
            fast=kernels.gelu_linear,
            eager=lambda x, bias, weight, bias_O: linear(plain_gelu.bias_gelu(x, bias), weight, bias_O),
            elements=(3 * B * L * F + F * D + N, 7 * B * L * F + 2 * (F * D + N)),
            flops=(2 * N * F, 4 * N * F), in_float8=True,
        ),
        Op(
            name="sum_rows", shape={"R": B * L, "D": D}, fast=kernels.sum_rows, eager=lambda x: x.sum(0),
            arguments=lambda make: (make.normal(B * L, D, grad=False),), elements=(N + D, 0), modes=("fwd",),
        ),
        Op(  # two bytes read, one written
            name="quantize_rows", shape={"R": B * L, "D": D}, fast=kernels.quantize_rows,
            eager=lambda x: plain_float8.quantize_rows(x, None, None),
            arguments=lambda make: (make.normal(B * L, D, grad=False),), elements=(N, 0),
            other_bytes=N + 4 * B * L, modes=("fwd",),
        ),
        Op(  # of the widest layer, with its columns
            name="quantize_weight", shape={"O": F, "D": D}, fast=kernels.quantize_weight,
            eager=lambda weight: plain_float8.quantize_weight(weight, True)[:3],
            arguments=lambda make: (make.normal(F, D, grad=False),), elements=(F * D, 0),
            other_bytes=2 * F * D + 4 * F, modes=("fwd",),
        ),
        Op(
            name="ln_modulate", shape={"B": B, "L": L, "D": D}, arguments=ln, fast=kernels.ln_modulate,
            eager=partial(plain_ln.ln_modulate, offsets=None, eps=1e-6), elements=(2 * N, 3 * N),
        ),
        Op(
            name="gate_residual_ln_modulate", shape={"B": B, "L": L, "D": D}, arguments=gate_ln,
            fast=kernels.gate_residual_ln_modulate,
            elements=(4 * N, 6 * N),
            eager=partial(plain_ln.gate_residual_ln_modulate, offsets=None, eps=1e-6),
        ),
        Op(
            name="bias_gelu", shape={"B": B, "L": L, "F": F}, fast=kernels.bias_gelu,
            arguments=lambda make: (make.normal(B, L, F), make.normal(F)),
            eager=plain_gelu.bias_gelu, elements=(2 * B * L * F, 3 * B * L * F),
        ),
    ]  # fmt: skip


def _tokens(B: int, L: int, K: int, D: int) -> list[Op]:
    shape = {"B": B, "L": L, "K": K, "D": D}
    unmask = B * (K + L) * D + L * D

    def gather(make: Maker) -> tuple[Any, ...]:
        plan = make.plan(B, L, K)
        return make.normal(B, L, D), plan.ids_keep, plan.ids_restore

    return [
        Op(
            name="gather_tokens", shape=shape, arguments=gather, fast=kernels.gather_tokens,
            eager=lambda x, ids, restore: plain_tokens.gather_tokens(x, ids),
            elements=(2 * B * K * D, B * (K + L) * D),
        ),
        Op(
            name="unmask_tokens", shape=shape, fast=kernels.unmask_tokens, eager=plain_tokens.unmask_tokens,
            arguments=lambda make: (
                make.normal(B, K, D), make.normal(1, 1, D), make.normal(1, L, D),
                make.plan(B, L, K).ids_restore,
            ),
            elements=(unmask, unmask),
        ),
        Op(
            name="merge_tokens", shape=shape, fast=kernels.merge_tokens, eager=plain_tokens.merge_tokens,
            arguments=lambda make: (
                make.normal(B, L, D), make.normal(B, L - K, D), make.plan(B, L, K).ids_restore,
            ),
            elements=(2 * B * L * D, B * (3 * L - K) * D),
        ),
    ]  # fmt: skip


def _linear(B: int, L: int, D: int) -> list[Op]:
    N, P, side = B * L * D, CHANNELS * PATCH**2, PATCH * round(L**0.5)
    small = 2 * D * D + L * D + P * D
    x = B * CHANNELS * side**2
    return [
        Op(
            name="patch_embed", shape={"B": B, "L": L, "D": D, "C": CHANNELS, "p": PATCH},
            fast=kernels.patch_embed, eager=plain_patch.patch_embed,
            arguments=lambda make: (
                make.normal(B, CHANNELS, side, side, grad=False),
                make.normal(D, CHANNELS, PATCH, PATCH, std=P**-0.5), make.normal(D),
                make.normal(1, L, D),
            ),
            elements=(x + P * D + L * D + N, x + N + P * D + L * D),
            flops=(2 * N * P, 2 * N * P),
        ),
        Op(
            name="skip_linear", shape={"B": B, "L": L, "D": D}, fast=kernels.skip_linear,
            eager=plain_skip.skip_linear,
            arguments=lambda make: (
                make.normal(B, L, D), make.normal(B, L, D), make.normal(D, 2 * D, std=(2 * D) ** -0.5),
                make.normal(D),
            ),
            elements=(3 * N + 2 * D * D, 5 * N + 4 * D * D), flops=(4 * N * D, 8 * N * D),
        ),
        Op(
            name="patch_skip_linear", shape={"B": B, "L": L, "D": D, "P": P},
            fast=kernels.patch_skip_linear, eager=plain_skip.patch_skip_linear,
            arguments=lambda make: (
                make.normal(B, L, D), make.normal(B, L, P, grad=False), make.normal(D, P, std=P**-0.5),
                make.normal(D), make.normal(1, L, D), make.normal(D, 2 * D, std=(2 * D) ** -0.5),
                make.normal(D),
            ),
            elements=(2 * N + B * L * P + small, 3 * N + B * L * P + 2 * small),
            flops=(2 * (N * (D + P) + (L + P) * D * D), 2 * (N * (2 * D + P) + 2 * (L + P) * D * D)),
        ),
    ]  # fmt: skip


def _sampling(images: int) -> Op:
    """A guided step on latents. The model's output is in the requested dtype, everything else in float32."""
    B, side = 2 * images, PATCH * round(TOKENS**0.5)
    N = B * CHANNELS * side**2
    alphas_cumprod = torch.linspace(0.9999, 0.98, 1000, dtype=torch.float64).cumprod(0)

    def arguments(make: Maker) -> tuple[Any, ...]:
        with_float32 = Maker(make.device, torch.float32)
        x, noise = (with_float32.normal(B, CHANNELS, side, side, grad=False) for _ in range(2))
        return (
            make.normal(B, 2 * CHANNELS, side, side, grad=False), x, noise,
            kernels.ddpm_coefficients(alphas_cumprod)[500].to(make.device),
            torch.full((images,), 4.0, device=make.device),
        )  # fmt: skip

    def eager(
        output: Tensor, x: Tensor, noise: Tensor, row_K: Tensor, scale_n: Tensor
    ) -> tuple[Tensor, Tensor]:
        rows_BK = row_K.expand(len(x), -1)
        return plain_cfg.cfg_step(output, x, noise, rows_BK, scale_n, 3, "ddpm", "epsilon", False)

    return Op(
        name="cfg_step", shape={"B": B, "C": CHANNELS, "S": side}, arguments=arguments,
        fast=lambda *tensors: kernels.cfg_step(*tensors[:-1], scale=tensors[-1]), eager=eager,
        elements=(2 * N, 0), other_bytes=16 * N, modes=("fwd",),
    )  # fmt: skip


def _masks(B: int, L: int, K: int) -> Op:
    """Drawing a mask. Noise is always float32; ids are int64."""

    def arguments(make: Maker) -> tuple[Any, ...]:
        return torch.rand(B, L, generator=make.generator, device=make.device), K

    return Op(
        name="mask_plan", shape={"B": B, "L": L, "K": K}, arguments=arguments, fast=kernels.mask_plan,
        eager=plain_mask.mask_plan, elements=(0, 0), other_bytes=B * L * (4 + 8 + 8 + 4), modes=("fwd",),
    )  # fmt: skip
