"""Argument checks and dispatch: the native op if it is loaded and supports the tensors, else
``reference.py``."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..native import library
from ..registry import needs_grad
from . import reference

MOST_AVERAGES = 64
"""Most averages per call: the CUDA op's limit, applied everywhere."""
NATIVE = (torch.float32, torch.bfloat16)
"""The dtypes of the native ops. They compute in float32, so float64 goes to PyTorch."""
MASTERS = {"adan_step": 5, "adamw_step": 3}
"""Where an op's arguments have the masters, which the averages follow, counted after the parameters."""


def grad_norm(grads: Sequence[Tensor]) -> Tensor:
    """The global 2-norm of ``grads``: 0-dim float64 on their device, without a synchronisation.

    An empty list gives 0. Where gradients are enabled and one of ``grads`` requires one, so does the result
    (PyTorch then computes it). Raises ``ValueError`` for tensors that are not dense and floating-point
    (float8 is not) or are on several devices.
    """
    return grad_sumsq(grads).sqrt()


def grad_sumsq(grads: Sequence[Tensor]) -> Tensor:
    """The sum of squares of all elements of ``grads``, accumulated in float64; otherwise as
    :func:`grad_norm`.

    On CUDA each thread sums its at most 64 numbers in float32, so a number beyond 1.8e19 counts as infinite.

    In a distributed run, add it up over the ranks before taking the root.
    """
    grads = list(grads)
    if not grads:
        return torch.zeros((), dtype=torch.float64)
    for i, grad in enumerate(grads):
        if not isinstance(grad, Tensor):
            checks.tensor(f"grads[{i}]", grad)
        if grad.layout != torch.strided:
            raise ValueError(f"grads[{i}]: {grad.layout}, expected a dense tensor")
        if grad.dtype not in checks.FLOATING or grad.device != grads[0].device:
            raise ValueError(
                f"grads[{i}]: {grad.dtype} on {grad.device}, expected floating-point on {grads[0].device}"
            )
    served = all(grad.dtype in NATIVE and is_dense(grad) for grad in grads)
    # The native op has no derivative.
    plain = needs_grad(tuple(grads)) or checks.plain_only()
    if served and not plain and library(grads[0].device.type):
        return torch.ops.mdt_fast.grad_sumsq(grads)
    return reference.grad_sumsq(grads)


def adan_step(
    *,
    params: list[Tensor],
    grads: list[Tensor],
    exp_avg: list[Tensor],
    exp_avg_diff: list[Tensor],
    exp_avg_sq: list[Tensor],
    neg_pre_grad: list[Tensor],
    masters: list[Tensor],
    emas: list[Tensor],
    steps: list[Tensor],
    lr: Tensor,
    grad_norm: Tensor,
    beta1: float = 0.98,
    beta2: float = 0.92,
    beta3: float = 0.99,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    no_prox: bool = False,
    max_grad_norm: float = 0.0,
    clip_eps: float = 1e-8,
    ema_decays: Sequence[float] = (),
) -> None:
    """One step of Adan for n tensors, in place: clipping, update, master weights and averages in one pass.

    ``params`` are n tensors, all float32 (``masters`` is empty), all bfloat16 (``masters`` are n float32
    tensors, which are updated and then rounded into the parameters) or all float64 (reference only).
    ``grads`` are n tensors of one dtype and are never written. Each moment is n tensors, all float32 or all
    bfloat16 (float64 with float64 parameters). ``neg_pre_grad`` receives minus the clipped gradient; step 1
    does not read it. ``emas`` are E * n tensors for E ``ema_decays``, the n of the first average first;
    float32, or float64 with float64 parameters. ``steps`` are 1 or n 0-dim float32 tensors, which this call
    increments. ``lr`` is 0-dim float32, or float64 with float64 parameters. ``grad_norm`` is 0-dim float64,
    the norm over everything that is clipped together. All tensors are on one device. The tensors of one
    parameter have the same shape; the native op also needs them dense and with the same strides.

    With g = grad * min(1, max_grad_norm / (grad_norm + clip_eps)) (``max_grad_norm`` 0: no clipping) and
    k = step + 1:
    d = g + neg_pre_grad (0 if k = 1); m = b1 m + (1-b1) g; v = b2 v + (1-b2) d;
    n = b3 n + (1-b3) (g + b2 d)^2;
    p -= lr (m / (1-b1^k) + b2 v / (1-b2^k)) / (sqrt(n / (1-b3^k)) + eps); p /= 1 + lr weight_decay
    (with ``no_prox``, p *= 1 - lr weight_decay before the update instead); ema = decay ema + (1 - decay) p.

    If ``grad_norm`` is not finite, nothing changes. Raises ``ValueError``, before anything changes, for
    lists, shapes, dtypes, devices or numbers that do not fit. Source: Xie et al. 2022, algorithm 1.
    """
    moments = {
        "exp_avg": exp_avg, "exp_avg_diff": exp_avg_diff, "exp_avg_sq": exp_avg_sq,
        "neg_pre_grad": neg_pre_grad,
    }  # fmt: skip
    betas = {"beta1": beta1, "beta2": beta2, "beta3": beta3}
    numbers = {"eps": eps, "weight_decay": weight_decay, "max_grad_norm": max_grad_norm, "clip_eps": clip_eps}
    _check(params, grads, moments, masters, emas, steps, lr, grad_norm, betas, numbers, ema_decays)
    native = _serves([params, grads, *moments.values(), masters, *_averages(emas, len(params))])
    run("adan_step", native, params, grads, *moments.values(), masters, emas, steps, lr, grad_norm,
        *betas.values(), eps, weight_decay, no_prox, max_grad_norm, clip_eps, list(ema_decays))  # fmt: skip


def adamw_step(
    *,
    params: list[Tensor],
    grads: list[Tensor],
    exp_avg: list[Tensor],
    exp_avg_sq: list[Tensor],
    masters: list[Tensor],
    emas: list[Tensor],
    steps: list[Tensor],
    lr: Tensor,
    grad_norm: Tensor,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    max_grad_norm: float = 0.0,
    clip_eps: float = 1e-6,
    ema_decays: Sequence[float] = (),
) -> None:
    """One step of AdamW for n tensors, in place.

    Arguments, clipping, averages and errors are as for :func:`adan_step`.

    p *= 1 - lr weight_decay; m = b1 m + (1-b1) g; v = b2 v + (1-b2) g^2;
    p -= lr (m / (1-b1^k)) / (sqrt(v / (1-b2^k)) + eps).
    Source: Loshchilov and Hutter 2019, in the form of ``torch.optim.AdamW``.
    """
    moments = {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
    betas = {"beta1": beta1, "beta2": beta2}
    numbers = {"eps": eps, "weight_decay": weight_decay, "max_grad_norm": max_grad_norm, "clip_eps": clip_eps}
    _check(params, grads, moments, masters, emas, steps, lr, grad_norm, betas, numbers, ema_decays)
    native = _serves([params, grads, *moments.values(), masters, *_averages(emas, len(params))])
    run("adamw_step", native, params, grads, *moments.values(), masters, emas, steps, lr, grad_norm,
        *betas.values(), eps, weight_decay, max_grad_norm, clip_eps, list(ema_decays))  # fmt: skip


def run(name: str, native: bool, params: list[Tensor], *args: Any) -> None:
    """``adan_step`` or ``adamw_step`` without checks; ``native``: the layouts suit the native op."""
    if not params:
        return
    if native and params[0].dtype in NATIVE and library(params[0].device.type):
        getattr(torch.ops.mdt_fast, name)(params, *args)
        if not torch.compiler.is_compiling():  # so that autograd notices the change, as of PyTorch's own ops
            masters, emas = args[MASTERS[name] : MASTERS[name] + 2]
            torch.autograd.graph.increment_version([*params, *masters, *emas])
    else:
        getattr(reference, name)(params, *args)


def is_dense(x: Tensor) -> bool:
    """Whether the elements fill one range of memory without gaps or overlaps, in any order of dimensions."""
    if x.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted((stride, size) for stride, size in zip(x.stride(), x.shape) if size != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def _serves(lists: list[list[Tensor]]) -> bool:
    """Whether the layouts suit the native op: dense, with equal strides for all tensors of a parameter."""
    params = lists[0]
    return all(is_dense(p) for p in params) and all(
        tensor.stride() == p.stride() for tensors in lists[1:] for tensor, p in zip(tensors, params)
    )


def _averages(emas: list[Tensor], n: int) -> list[list[Tensor]]:
    return [emas[i : i + n] for i in range(0, len(emas), max(n, 1))]


def _check(
    params: list[Tensor],
    grads: list[Tensor],
    moments: dict[str, list[Tensor]],
    masters: list[Tensor],
    emas: list[Tensor],
    steps: list[Tensor],
    lr: Tensor,
    grad_norm: Tensor,
    betas: dict[str, float],
    numbers: dict[str, float],
    ema_decays: Sequence[float],
) -> None:
    for name, beta in (*betas.items(), *((f"ema_decays[{i}]", decay) for i, decay in enumerate(ema_decays))):
        if not 0 <= beta < 1:
            raise ValueError(f"{name}: got {beta}, expected [0, 1)")
    for name, number in numbers.items():
        if not 0 <= number < float("inf"):
            raise ValueError(f"{name}: got {number}, expected finite numbers of at least 0")
    if len(ema_decays) > MOST_AVERAGES:
        raise ValueError(f"ema_decays: {len(ema_decays)}, expected up to {MOST_AVERAGES}")
    n = len(params)
    double = bool(params) and params[0].dtype == torch.float64
    half = bool(params) and params[0].dtype == torch.bfloat16
    wide = (torch.float64,) if double else (torch.float32,)
    _list("params", params, params, n, (*NATIVE, torch.float64))
    _list("grads", grads, params, n, wide if double else NATIVE)
    for name, tensors in moments.items():
        _list(name, tensors, params, n, wide if double else NATIVE)
        if n and tensors[0].dtype != _moment_dtype(moments):
            raise ValueError(f"{name}: {tensors[0].dtype}, but exp_avg is {_moment_dtype(moments)}")
    _list("masters", masters, params, n if half else 0, (torch.float32,))
    _list("emas", emas, params * len(ema_decays), n * len(ema_decays), (torch.float32, *wide))
    if len(steps) not in (1, n):
        raise ValueError(f"steps: {len(steps)} tensors, expected 1 or {n}")
    scalars = (("lr", lr, (torch.float32, *wide)), ("grad_norm", grad_norm, (torch.float64,)))
    for name, scalar, dtypes in (
        *((f"steps[{i}]", s, (torch.float32,)) for i, s in enumerate(steps)),
        *scalars,
    ):
        checks.tensor(name, scalar)
        fits = scalar.ndim == 0 and scalar.dtype in dtypes
        if not fits or (params and scalar.device != params[0].device):
            raise ValueError(
                f"{name}: {scalar.dtype} {list(scalar.shape)} on {scalar.device}, expected 0-dim "
                f"{' or '.join(map(str, dict.fromkeys(dtypes)))} on the parameters' device"
            )


def _moment_dtype(moments: dict[str, list[Tensor]]) -> torch.dtype:
    return moments["exp_avg"][0].dtype


def _list(
    name: str, tensors: list[Tensor], params: list[Tensor], n: int, dtypes: tuple[torch.dtype, ...]
) -> None:
    """Check for ``n`` tensors with the parameters' shapes and device, all of one of ``dtypes``."""
    if len(tensors) != n:
        raise ValueError(f"{name}: {len(tensors)} tensors, expected {n}")
    for i, (tensor, param) in enumerate(zip(tensors, params)):
        checks.tensor(f"{name}[{i}]", tensor)
        if tensor.shape != param.shape:
            raise ValueError(f"{name}[{i}]: shape {list(tensor.shape)}, expected {list(param.shape)}")
        if tensor.device != params[0].device:
            raise ValueError(f"{name}[{i}]: on {tensor.device}, expected {params[0].device}")
        if tensor.dtype not in dtypes or tensor.dtype != tensors[0].dtype:
            allowed = " or ".join(map(str, dict.fromkeys(dtypes)))
            raise ValueError(f"{name}[{i}]: {tensor.dtype}, expected {allowed}, the same for all")


if library("cpu") or library("cuda"):  # shape functions of the native ops, for torch.compile
    torch.library.register_fake(
        "mdt_fast::grad_sumsq", lambda grads: grads[0].new_empty((), dtype=torch.float64)
    )
    for _name in ("adan_step", "adamw_step"):
        torch.library.register_fake(f"mdt_fast::{_name}", lambda *args: None)
