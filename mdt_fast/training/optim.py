"""Optimisers, learning-rate schedule and the moving average of weights.

Both optimisers clip the global gradient norm themselves and leave it, as it was before clipping, in
``grad_norm``: the loop logs it without a second pass over the gradients.
"""

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..config import TrainConfig
from ..errors import UserError

CLIP_EPS = 1e-6  # torch.nn.utils.clip_grad_norm_'s, for AdamW; Adan's published form has its own eps


def clip_(grads: list[Tensor], max_norm: float, eps: float) -> Tensor:
    """Scale ``grads`` in place to a global norm of at most ``max_norm`` (0: any); returns the norm before."""
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
    if max_norm > 0:
        torch._foreach_mul_(grads, (max_norm / (norm + eps)).clamp(max=1.0))
    return norm


class AdamW(torch.optim.AdamW):
    """torch's AdamW behind a clip of the global gradient norm (``max_grad_norm`` 0: no clipping)."""

    grad_norm: Tensor

    def __init__(self, params: Iterable[Tensor], max_grad_norm: float = 0.0, **kwargs: Any):
        super().__init__(params, **kwargs)
        self.max_grad_norm = max_grad_norm

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> Any:
        self.grad_norm = clip_(_grads(self), self.max_grad_norm, CLIP_EPS)
        return super().step(closure)


class Adan(torch.optim.Optimizer):
    """Adan (Xie et al. 2022, Algorithm 1), in foreach operations; plain PyTorch, any device.

    With the clipped gradient g, its change d = g - g_prev (0 in the first step) and step k:
    m = b1 m + (1-b1) g;  v = b2 v + (1-b2) d;  n = b3 n + (1-b3) (g + b2 d)^2;
    p -= lr (m / (1-b1^k) + b2 v / (1-b2^k)) / (sqrt(n / (1-b3^k)) + eps);  p /= 1 + lr weight_decay.
    """

    grad_norm: Tensor

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float = 3e-4,
        betas: tuple[float, float, float] = (0.98, 0.92, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        max_grad_norm: float = 0.0,
    ):
        if any(not 0 <= beta < 1 for beta in betas) or len(betas) != 3:
            raise UserError(f"betas: three values in [0, 1) needed, got {betas}")
        super().__init__(
            params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "step": 0}
        )
        self.max_grad_norm = max_grad_norm

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.grad_norm = clip_(_grads(self), self.max_grad_norm, self.defaults["eps"])
        for group in self.param_groups:
            group["step"] += 1
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                self._update(params, group)
        return loss

    def _update(self, params: list[Tensor], group: dict[str, Any]) -> None:
        for p in params:
            if not self.state[p]:
                zeros = {name: torch.zeros_like(p) for name in ("exp_avg", "exp_avg_diff", "exp_avg_sq")}
                self.state[p].update(zeros, prev_grad=p.grad.clone())  # type: ignore[union-attr]
        grads = [p.grad for p in params if p.grad is not None]
        m, v, n, prev = (
            [self.state[p][name] for p in params]
            for name in ("exp_avg", "exp_avg_diff", "exp_avg_sq", "prev_grad")
        )
        (b1, b2, b3), k, lr = group["betas"], group["step"], group["lr"]

        d = torch._foreach_sub(grads, prev)
        torch._foreach_lerp_(m, grads, 1 - b1)
        torch._foreach_lerp_(v, d, 1 - b2)
        u = torch._foreach_add(grads, d, alpha=b2)
        torch._foreach_mul_(n, b3)
        torch._foreach_addcmul_(n, u, u, value=1 - b3)

        denom = torch._foreach_sqrt(n)
        torch._foreach_div_(denom, (1 - b3**k) ** 0.5)
        torch._foreach_add_(denom, group["eps"])
        torch._foreach_addcdiv_(params, m, denom, value=-lr / (1 - b1**k))
        torch._foreach_addcdiv_(params, v, denom, value=-lr * b2 / (1 - b2**k))
        if group["weight_decay"]:
            torch._foreach_div_(params, 1 + lr * group["weight_decay"])
        torch._foreach_copy_(prev, grads)


def _grads(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    if not grads:
        raise UserError("optimizer.step(): no parameter has a gradient; call backward() first")
    return grads


def build_optimizer(params: Iterable[Tensor], config: TrainConfig) -> Adan | AdamW:
    """The optimiser that ``config`` names, over the parameters that require a gradient."""
    for name, value in (("lr", config.lr), ("weight_decay", config.weight_decay)):
        if not 0 <= value < float("inf"):
            raise UserError(f"train.{name}: must be at least 0 and finite, got {value}")
    trained = [p for p in params if p.requires_grad]
    cls: type[Adan | AdamW] = Adan if config.optimizer == "adan" else AdamW
    return cls(trained, lr=config.lr, weight_decay=config.weight_decay, max_grad_norm=config.max_grad_norm)


def learning_rate(config: TrainConfig, step: int) -> float:
    """The rate of update ``step`` (counted from 0): linear warm-up, then the official linear anneal.

    The official loop sets the annealed rate *after* each step, so updates 0 and 1 both run at the full rate
    and the last of ``lr_anneal_steps`` is above zero; reproduced.
    """
    warmup = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    anneal = 1 - max(step - 1, 0) / config.lr_anneal_steps if config.lr_anneal_steps else 1.0
    return config.lr * warmup * max(anneal, 0.0)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


class Ema:
    """An exponential moving average of a model's parameters: ``ema = decay * ema + (1 - decay) * param``.

    It starts as a copy and lives in ``.model`` (eval mode, no gradients), ready to sample from.
    """

    def __init__(self, model: nn.Module, decay: float):
        if not 0 <= decay < 1:
            raise UserError(f"train.ema_decay: must be in [0, 1), got {decay}")
        self.decay = decay
        self.model = copy.deepcopy(model).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        torch._foreach_lerp_(list(self.model.parameters()), list(model.parameters()), 1 - self.decay)
