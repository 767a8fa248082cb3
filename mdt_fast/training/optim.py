"""The optimiser that a configuration names, the learning-rate schedule and the moving average of weights."""

import copy
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ..config import TrainConfig
from ..errors import UserError
from ..optim import FusedAdamW, FusedAdan


def build_optimizer(params: Iterable[Tensor], config: TrainConfig) -> FusedAdan | FusedAdamW:
    """The optimiser that ``config`` names, over the parameters that require a gradient."""
    for name, value in (("lr", config.lr), ("weight_decay", config.weight_decay)):
        if not 0 <= value < float("inf"):
            raise UserError(f"train.{name}: must be at least 0 and finite, got {value}")
    trained = [p for p in params if p.requires_grad]
    cls: type[FusedAdan | FusedAdamW] = FusedAdan if config.optimizer == "adan" else FusedAdamW
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

    It starts as a copy and lives in ``.model`` (eval mode, no gradients), ready to sample from. The optimiser
    it is attached to moves it, in every step that is not skipped.
    """

    def __init__(self, model: nn.Module, decay: float):
        if not 0 <= decay < 1:
            raise UserError(f"train.ema_decay: must be in [0, 1), got {decay}")
        self.decay = decay
        self.model = copy.deepcopy(model).eval().requires_grad_(False)

    def attach(self, optimizer: FusedAdan | FusedAdamW, model: nn.Module) -> None:
        """Have ``optimizer``, which is over parameters of ``model``, move the copies of those parameters."""
        copies = dict(zip(model.parameters(), self.model.parameters()))
        trained = [p for group in optimizer.param_groups for p in group["params"]]
        optimizer.add_ema([copies[p] for p in trained], self.decay)
