"""Optimiser steps over a published model's tensors: everything in one sweep, compared with separate sweeps.

A step consists of the global norm and clipping, the update and one moving average. All tensors are float32.
"""

import importlib.util
from collections.abc import Callable, Iterable
from functools import partial
from math import prod

import torch
from torch import Tensor, nn

import mdt_fast
import points
from mdt_fast.kernels.backends import backends
from mdt_fast.kernels.optim import reference
from mdt_fast.optim import FusedAdamW, FusedAdan
from providers import Skip

PROVIDERS = {"adan_step": ("fast", "eager", "timm"), "adamw_step": ("fast", "eager", "fused", "apex")}
"""``eager``: clip_grad_norm_, foreach operations, a lerp. ``fused``: the same with torch's fused AdamW."""

MOVED = {"adan_step": 56, "adamw_step": 40}
"""Bytes moved per parameter: the gradient is read twice (for its norm), all else is read and written once."""

MOST = 300_000_000
"""The most parameters, so that all providers fit into memory together; larger models are cut to fit."""

DECAY, MAX_NORM, LR = 0.9999, 1.0, 1e-2
COMPARED = 16
"""The number of leading tensors compared between providers."""

Step = Callable[[], object]


def shapes(model: str) -> list[torch.Size]:
    """The shapes of the trained tensors of MDTv2-``model``/2, leaving out any that would exceed ``MOST``."""
    with torch.device("meta"):
        net = getattr(mdt_fast, f"MDTv2_{model}_2")()
    found: list[torch.Size] = []
    left = MOST
    for parameter in net.parameters():
        if parameter.requires_grad and parameter.numel() <= left:
            found.append(parameter.shape)
            left -= parameter.numel()
    return found


def point(op: str, model: str) -> points.Point:
    """The point for a step of ``adan_step`` or ``adamw_step`` at this model size."""
    sizes = shapes(model)
    numbers = sum(map(prod, sizes))
    served = {row.op: row.backend for row in backends()}
    return points.Point(
        bench="kernels", op=op, mode="fwd", shape={"tensors": len(sizes), "numbers": numbers},
        dtype=torch.float32, prepare=partial(_prepare, op, sizes), base="eager", oracle="eager",
        bytes=MOVED[op] * numbers, roofline=True, providers=PROVIDERS[op],
        switches={"fast": {"backend": served[op]}},
    )  # fmt: skip


def _prepare(
    op: str, sizes: Iterable[torch.Size], device: torch.device
) -> dict[str, Callable[[], points.Call]]:
    steps: dict[str, Callable[[list[nn.Parameter], list[Tensor]], Step]] = (
        {"fast": _fast(FusedAdan), "eager": _adan, "timm": _timm}
        if op == "adan_step"
        else {"fast": _fast(FusedAdamW), "eager": _adamw(foreach=True), "fused": _adamw(fused=True),
              "apex": _apex}
    )  # fmt: skip

    def make(begin: Callable[[list[nn.Parameter], list[Tensor]], Step]) -> points.Call:
        generator = torch.Generator(device).manual_seed(0)
        params = [
            nn.Parameter(0.02 * torch.randn(size, generator=generator, device=device)) for size in sizes
        ]
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator, device=device)
        emas = [p.detach().clone() for p in params]
        step = begin(params, emas)

        def call() -> list[Tensor]:
            step()
            return [p.detach() for p in params[:COMPARED]] + emas[:COMPARED]

        return call

    return {name: partial(make, begin) for name, begin in steps.items()}


def _fast(cls: type[FusedAdan] | type[FusedAdamW]) -> Callable[[list[nn.Parameter], list[Tensor]], Step]:
    def begin(params: list[nn.Parameter], emas: list[Tensor]) -> Step:
        optimizer = cls(params, lr=LR, weight_decay=0.0, max_grad_norm=MAX_NORM)
        optimizer.add_ema(emas, DECAY)
        return optimizer.step

    return begin


def _with_sweeps(params: list[nn.Parameter], emas: list[Tensor], update: Step) -> Step:
    """``update`` with clipping before it and the moving average after it, each a separate sweep."""

    def step() -> None:
        torch.nn.utils.clip_grad_norm_(params, MAX_NORM, foreach=True)
        update()
        with torch.no_grad():
            torch._foreach_lerp_(emas, [p.detach() for p in params], 1 - DECAY)

    return step


def _adan(params: list[nn.Parameter], emas: list[Tensor]) -> Step:
    moments = [[torch.zeros_like(p) for p in params] for _ in range(4)]
    device = params[0].device
    counts, lr = [torch.zeros((), device=device)], torch.tensor(LR, device=device)
    norm = torch.zeros((), dtype=torch.float64, device=device)

    def update() -> None:
        grads = [p.grad for p in params]
        weights = [p.detach() for p in params]
        reference.adan_step(weights, grads, *moments, [], [], counts, lr, norm, 0.98, 0.92, 0.99, 1e-8, 0.0,
                            False, 0.0, 1e-8, [])  # fmt: skip

    return _with_sweeps(params, emas, update)


def _adamw(**form: bool) -> Callable[[list[nn.Parameter], list[Tensor]], Step]:
    def begin(params: list[nn.Parameter], emas: list[Tensor]) -> Step:
        on_gpu = params[0].is_cuda  # where steps are replayed as a graph
        optimizer = torch.optim.AdamW(params, lr=LR, weight_decay=0.0, capturable=on_gpu, **form)
        return _with_sweeps(params, emas, optimizer.step)

    return begin


def _timm(params: list[nn.Parameter], emas: list[Tensor]) -> Step:
    try:
        from timm.optim.adan import Adan
    except Exception as error:  # timm needs torchvision, which may fail in its own ways
        raise Skip(f"timm cannot be imported ({type(error).__name__})") from None
    return _with_sweeps(params, emas, Adan(params, lr=LR, weight_decay=0.0, foreach=True).step)


def _apex(params: list[nn.Parameter], emas: list[Tensor]) -> Step:
    if importlib.util.find_spec("apex") is None or not params[0].is_cuda:
        raise Skip("apex is not installed, or there is no CUDA device")
    from apex.optimizers import FusedAdam

    return _with_sweeps(params, emas, FusedAdam(params, lr=LR, adam_w_mode=True, weight_decay=0.0).step)
