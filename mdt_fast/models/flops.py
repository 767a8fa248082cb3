"""Matmul FLOPs (2 per multiply-add) of a model, counted by torch on the meta device, which uses no memory
and does no arithmetic.

All providers are credited with what the *reference* needs; a provider may execute fewer.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from ..config import ModelConfig, Switches
from ..kernels import flops as flops  # the formulas for our own ops
from ..masking import MaskPlan
from . import zoo

DEEP = 12
"""Number of blocks in the three shallow models that stand in for a deeper one (:func:`of_any_depth`)."""


@dataclass(frozen=True)
class Count:
    """A number of FLOPs, and which of our ops ran without a FLOP formula (then ``flops`` is too low)."""

    flops: int
    uncounted: tuple[str, ...] = ()


def count(call: Callable[[], object]) -> Count:
    """FLOPs of all matmuls, convolutions and attentions that ``call`` runs, including its backward pass."""
    with FlopCounterMode(display=False) as counter, _OwnOps() as own:
        call()
    return Count(counter.get_total_flops(), tuple(sorted(own.names)))


class _OwnOps(TorchDispatchMode):
    """Records which of our ops run without a formula."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet = func._overloadpacket
        if func.namespace == "mdt_fast" and packet not in flop_registry:
            self.names.add(str(packet))
        return func(*args, **(kwargs or {}))


def of_any_depth(config: ModelConfig, counted: Callable[[ModelConfig], Count]) -> Count:
    """``counted(config)``; for a deep model, extrapolated from three shallow ones. All blocks of a kind (in
    the encoder's first half, its second half, the decoder) need the same FLOPs, so the total is linear in the
    number of each kind. This is exact, and takes less than half the time for 28 blocks."""
    decoder = config.decode_layer
    encoder = config.depth - decoder
    few, one = 2 + encoder % 2, min(decoder, 1)
    if config.depth <= DEEP or encoder < few + 2:
        return counted(config)
    base = counted(replace(config, depth=few + one, decode_layer=one))
    two_more = counted(replace(config, depth=few + 2 + one, decode_layer=one))
    total = base.flops + (two_more.flops - base.flops) * (encoder - few) // 2
    if decoder > one:
        decodes_twice = counted(replace(config, depth=few + 2, decode_layer=2))
        total += (decodes_twice.flops - base.flops) * (decoder - one)
    return Count(total, base.uncounted)


@cache
def meta_model(
    config: ModelConfig, implementation: zoo.Implementation = "reference", switches: Switches | None = None
) -> nn.Module:
    """The model of ``config`` without storage; ``switches`` are for the fast implementation."""
    with torch.device("meta"):
        model: Any = zoo.build_model(config, implementation=implementation)
    if switches is not None:
        model.set_switches(switches)
    return model


@cache
def forward(
    config: ModelConfig, len_keep: int | None = None, implementation: zoo.Implementation = "reference"
) -> Count:
    """One forward pass of one image; with ``len_keep``, a masked pass that keeps that many tokens."""
    return of_any_depth(config, lambda config: count(lambda: _forward(config, len_keep, implementation)))


@cache
def train_step(
    config: ModelConfig,
    len_keep: int | None,
    implementation: zoo.Implementation = "reference",
    batch: int = 1,
    switches: Switches | None = None,
) -> Count:
    """Forward and backward of ``batch`` images: a pass over all tokens and (unless ``len_keep`` is None) a
    masked pass. A packed step has the same products as these two passes."""

    def passes(config: ModelConfig) -> None:
        loss = _forward(config, None, implementation, batch, switches).sum()
        if len_keep is not None:
            loss = loss + _forward(config, len_keep, implementation, batch, switches).sum()
        loss.backward()

    return of_any_depth(config, lambda config: count(lambda: passes(config)))


@cache
def sample_step(config: ModelConfig, implementation: zoo.Implementation = "reference") -> Count:
    """One guided denoising step of one image: the conditional and the unconditional forward pass."""

    def step(config: ModelConfig) -> None:
        x, t, y = inputs(config, batch=2)
        model: Any = meta_model(config, implementation).eval()
        model.forward_with_cfg(x, t, y, cfg_scale=4.0)

    return of_any_depth(config, lambda config: count(lambda: step(config)))


def _forward(
    config: ModelConfig,
    len_keep: int | None,
    implementation: zoo.Implementation,
    batch: int = 1,
    switches: Switches | None = None,
) -> torch.Tensor:
    model: Any = meta_model(config, implementation, switches).train()
    if len_keep is None:
        return model(*inputs(config, batch))
    noise = torch.rand(batch, config.grid_size**2, device="meta")
    return model(*inputs(config, batch), enable_mask=True, mask_plan=MaskPlan.from_noise(noise, len_keep))


def inputs(config: ModelConfig, batch: int = 1) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    side = config.input_size
    x = torch.zeros(batch, config.in_channels, side, side, device="meta")
    t, y = (torch.zeros(batch, dtype=torch.int64, device="meta") for _ in range(2))
    return x, t, y
