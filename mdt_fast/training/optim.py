"""The optimiser that a configuration names, the learning-rate schedule and the moving average of weights."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from ..config import TrainConfig
from ..errors import UserError
from ..kernels.native import MISSING, library
from ..optim import FusedAdamW, FusedAdan
from ..optim.shards import local


def build_optimizer(params: Iterable[Tensor], config: TrainConfig) -> FusedAdan | FusedAdamW:
    """The optimiser that ``config`` names, over the parameters that require a gradient."""
    for name, value in (("lr", config.lr), ("weight_decay", config.weight_decay)):
        if not 0 <= value < float("inf"):
            raise UserError(f"train.{name}: must be at least 0 and finite, got {value}")
    trained = [p for p in params if p.requires_grad]
    cls: type[FusedAdan | FusedAdamW] = FusedAdan if config.optimizer == "adan" else FusedAdamW
    return cls(
        trained, lr=config.lr, weight_decay=config.weight_decay, max_grad_norm=config.max_grad_norm,
        moments_dtype=torch.bfloat16 if config.moments == "bfloat16" else None,
    )  # fmt: skip


def optimize(
    model: nn.Module, config: TrainConfig
) -> tuple[FusedAdan | FusedAdamW, "Ema", dict[str, Tensor]]:
    """The optimiser of ``model`` and the average that it moves. Where ``config.weights`` says so the model's
    weights are bfloat16 from now on, and those that they are roundings of, in float32, come third by name.
    ``UserError`` for bfloat16 moments where nothing rounds them at random."""
    device = next(model.parameters()).device.type
    if config.moments == "bfloat16" and not library(device):
        raise UserError(
            "train.moments: 'bfloat16' needs the op of csrc, which rounds at random (to the nearest, a "
            f"second moment hardly falls); on {device} it is {MISSING.get(device, 'not there')}"
        )
    ema = Ema(model, config.ema_decay)
    parameters = dict(model.named_parameters())
    masters: dict[str, Tensor] = {}
    if config.weights == "bfloat16":
        for name, p in parameters.items():
            masters[name], p.data = p.data.float(), p.data.bfloat16()
            if config.accumulate > 1:
                p.grad_dtype = torch.float32  # many parts would be lost in a bfloat16 sum
    optimizer = build_optimizer(parameters.values(), config)
    if masters:
        optimizer.set_masters(masters[name] for name, p in parameters.items() if p.requires_grad)
    ema.attach(optimizer)
    return optimizer, ema, masters


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


MOST_INITIAL = 0.05  # of the average; with more, pictures are visibly noisy


def unripe(decay: float, step: int, instead: str = "draw with mdt-fast sample --weights model") -> str | None:
    """One line if after ``step`` updates more than 5% of an average of ``decay`` are the initial weights;
    ``instead``: what can be done about it besides."""
    share = decay**step
    if share <= MOST_INITIAL:
        return None
    return (
        f"warning: after {step} steps the average of the weights (train.ema_decay={decay:g}) still holds "
        f"{share:.0%} of the initial ones, which draw noise if they were random; train for more steps or "
        f"with a smaller --set train.ema_decay, or {instead}"
    )


class Ema:
    """An exponential moving average of a model's parameters: ``ema = decay * ema + (1 - decay) * param``.

    ``tensors`` by name, laid out and sharded as the parameters are; they start as copies (of bfloat16 ones
    in float32). The optimiser it is attached to moves them, in every step that is not skipped.
    """

    def __init__(self, model: nn.Module, decay: float):
        if not 0 <= decay < 1:
            raise UserError(f"train.ema_decay: must be in [0, 1), got {decay}")
        self.decay, self.model = decay, model
        self.tensors = {
            name: p.detach().float() if p.dtype == torch.bfloat16 else p.detach().clone()
            for name, p in model.named_parameters()
        }

    def attach(self, optimizer: FusedAdan | FusedAdamW) -> None:
        """Have ``optimizer``, which is over parameters of the model, move the copies of those parameters."""
        copies = {p: self.tensors[name] for name, p in self.model.named_parameters()}
        trained = [p for group in optimizer.param_groups for p in group["params"]]
        optimizer.add_ema([copies[p] for p in trained], self.decay)

    @contextmanager
    def in_model(self) -> Iterator[nn.Module]:
        """Within the block the model has the averaged weights, in eval mode; then its own, bit for bit."""
        self._exchange()
        training = self.model.training
        try:
            yield self.model.eval()
        finally:
            self.model.train(training)
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        if isinstance(self.model, FSDPModule):
            # What has been gathered of the weights before belongs to the others.
            self.model.reshard()
        for name, parameter in self.model.named_parameters():
            own, average = local(parameter), local(self.tensors[name])
            if own.dtype != average.dtype:
                parameter.data, self.tensors[name] = average, parameter.data
                continue
            kept = own.clone()
            own.copy_(average)
            average.copy_(kept)


class LossScale:
    """float16's loss scale: halved after a step with a gradient that is not finite, doubled after
    ``patience`` good ones. Kept on the device; nothing waits for it."""

    LARGEST = 2.0**24

    def __init__(self, device: torch.device, patience: int = 2000):
        self.patience = patience
        self.scale = torch.full((), 2.0**16, device=device)
        self.good = torch.zeros((), device=device)

    def unscale(self, optimizer: torch.optim.Optimizer) -> None:
        """Bring the gradients back to their size, in place."""
        params = [p for group in optimizer.param_groups for p in group["params"]]
        grads = [local(p.grad) for p in params if p.grad is not None]
        torch._foreach_mul_(grads, 1 / self.scale)

    def update(self, grad_norm: Tensor) -> None:
        """After a step whose gradient had this norm."""
        finite = grad_norm.isfinite()
        self.good = torch.where(finite, self.good + 1, 0)
        grow = self.good >= self.patience
        self.good = torch.where(grow, 0, self.good)
        factor = torch.where(finite, torch.where(grow, 2.0, 1.0), 0.5)
        self.scale = (self.scale * factor).clamp(1.0, self.LARGEST)
