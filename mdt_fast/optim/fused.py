"""Adan and AdamW."""

from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from .base import FusedOptimizer, Item
from .shards import local

CLIP_EPS = 1e-6  # for AdamW, from torch.nn.utils.clip_grad_norm_; published Adan uses its own eps


class FusedAdan(FusedOptimizer):
    """Adan (Xie et al. 2022, algorithm 1). States can be exchanged with timm's Adan in both directions.

    With the clipped gradient g, its change d = g - g_prev (0 in the first step) and step k:
    m = b1 m + (1-b1) g;  v = b2 v + (1-b2) d;  n = b3 n + (1-b3) (g + b2 d)^2;
    p -= lr (m / (1-b1^k) + b2 v / (1-b2^k)) / (sqrt(n / (1-b3^k)) + eps);  p /= 1 + lr weight_decay
    (with ``no_prox``, p *= 1 - lr weight_decay first instead). Steps are counted per group. The keyword-only
    arguments are described at :class:`FusedOptimizer`. Raises ``UserError`` for values that are not allowed.
    """

    op = "adan_step"
    betas = 3
    moments = ("exp_avg", "exp_avg_diff", "exp_avg_sq", "neg_pre_grad")
    fixed: ClassVar[dict[str, Any]] = {"caution": False, "foreach": None}
    refused = ("caution",)

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float, float] = (0.98, 0.92, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        no_prox: bool = False,
        *,
        max_grad_norm: float = 0.0,
        clip_norm: str = "global",
        moments_dtype: torch.dtype | None = None,
        process_group: dist.ProcessGroup | None = None,
    ):
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "no_prox": no_prox}
        super().__init__(params, defaults, max_grad_norm, clip_norm, moments_dtype, process_group)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        group["step"] = torch.tensor(float(group.get("step", 0)), dtype=torch.float32, device="cpu")

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("no_prox", False)
            step = group.get("step", 0)
            device = step.device if isinstance(step, Tensor) else "cpu"
            group["step"] = torch.as_tensor(step, dtype=torch.float32, device=device)

    def _steps(self, group: dict[str, Any], items: list[Item]) -> list[Tensor]:
        if items:
            group["step"] = group["step"].to(items[0].local.device)
        return [group["step"]]

    def _of(self, steps: list[Tensor], batch: list[tuple[int, Item]], last: bool) -> list[Tensor]:
        return steps if last else [steps[0].clone()]

    def _options(self, group: dict[str, Any]) -> tuple[Any, ...]:
        return (group["no_prox"],)

    def _clip_eps(self, group: dict[str, Any]) -> float:
        return group["eps"]

    def _start(self, group: dict[str, Any], item: Item, norm: Tensor) -> bool:
        """In a group's first step the op itself uses d = 0; this sets it for parameters that join later."""
        if group["step"] == 0:
            return True
        if not norm.isfinite():
            return False
        bound, long = self.max_grad_norm, float(norm) + group["eps"]
        scale = bound / long if 0 < bound < long else 1.0
        neg_pre_grad = local(self.state[item.param]["neg_pre_grad"])
        neg_pre_grad.copy_(item.grad.to(torch.promote_types(item.grad.dtype, torch.float32)) * -scale)
        return True


class FusedAdamW(FusedOptimizer):
    """AdamW (Loshchilov and Hutter 2019). States can be exchanged with ``torch.optim.AdamW``, both ways.

    With the clipped gradient g and the parameter's step k: p *= 1 - lr weight_decay; m = b1 m + (1-b1) g;
    v = b2 v + (1-b2) g^2; p -= lr (m / (1-b1^k)) / (sqrt(v / (1-b2^k)) + eps). The keyword-only arguments are
    described at :class:`FusedOptimizer`. ``plain``: torch's other options; those that would change the result
    must keep their defaults. Raises ``UserError`` for values that are not allowed.
    """

    op = "adamw_step"
    betas = 2
    moments = ("exp_avg", "exp_avg_sq")
    counted = ("step",)
    fixed: ClassVar[dict[str, Any]] = {
        "amsgrad": False, "maximize": False, "foreach": None, "capturable": False, "differentiable": False,
        "fused": None, "decoupled_weight_decay": True,
    }  # fmt: skip
    refused = ("amsgrad", "maximize", "differentiable", "decoupled_weight_decay")

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        *,
        max_grad_norm: float = 0.0,
        clip_norm: str = "global",
        moments_dtype: torch.dtype | None = None,
        process_group: dist.ProcessGroup | None = None,
        **plain: Any,
    ):
        if odd := sorted(plain.keys() - self.fixed.keys()):
            raise TypeError(f"FusedAdamW() got an unexpected keyword argument {odd[0]!r}")
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, **plain}
        super().__init__(params, defaults, max_grad_norm, clip_norm, moments_dtype, process_group)

    def _steps(self, group: dict[str, Any], items: list[Item]) -> list[Tensor]:
        return [self.state[item.param]["step"] for item in items]

    def _of(self, steps: list[Tensor], batch: list[tuple[int, Item]], last: bool) -> list[Tensor]:
        return [steps[number] for number, _ in batch]

    def _clip_eps(self, group: dict[str, Any]) -> float:
        return CLIP_EPS

    def _start(self, group: dict[str, Any], item: Item, norm: Tensor) -> bool:
        step = torch.zeros((), dtype=torch.float32, device=item.local.device)
        self.state[item.param] = {"step": step, **self.state[item.param]}
        return True
