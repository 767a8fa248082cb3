"""The optimiser, the learning-rate schedule and the EMA of the weights."""

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
    """Build the optimiser that ``config`` names, over the parameters that require a gradient."""
    for name, value in (("lr", config.lr), ("weight_decay", config.weight_decay)):
        if not 0 <= value < float("inf"):
            raise UserError(f"train.{name}: got {value}, expected a finite number of 0 or more")
    trained = [p for p in params if p.requires_grad]
    cls: type[FusedAdan | FusedAdamW] = FusedAdan if config.optimizer == "adan" else FusedAdamW
    return cls(
        trained, lr=config.lr, weight_decay=config.weight_decay, max_grad_norm=config.max_grad_norm,
        moments_dtype=torch.bfloat16 if config.moments == "bfloat16" else None,
    )  # fmt: skip


def optimize(
    model: nn.Module, config: TrainConfig
) -> tuple[FusedAdan | FusedAdamW, "Ema", dict[str, Tensor]]:
    """Return the optimiser of ``model``, the EMA that it updates, and float32 master weights by name. With
    ``config.weights`` bfloat16, the model's weights become bfloat16 roundings of the masters; otherwise the
    masters are empty. ``UserError`` for bfloat16 moments where stochastic rounding is not available."""
    device = next(model.parameters()).device.type
    if config.moments == "bfloat16" and not library(device):
        raise UserError(
            "train.moments: 'bfloat16' needs the op of csrc with stochastic rounding (rounded to nearest, a "
            f"second moment hardly decays); on {device} it is {MISSING.get(device, 'not there')}"
        )
    ema = Ema(model, config.ema_decay)
    parameters = dict(model.named_parameters())
    masters: dict[str, Tensor] = {}
    if config.weights == "bfloat16":
        for name, p in parameters.items():
            masters[name], p.data = p.data.float(), p.data.bfloat16()
            if config.accumulate > 1:
                p.grad_dtype = torch.float32  # a bfloat16 sum would lose many micro-batches' gradients
    optimizer = build_optimizer(parameters.values(), config)
    if masters:
        optimizer.set_masters(masters[name] for name, p in parameters.items() if p.requires_grad)
    ema.attach(optimizer)
    return optimizer, ema, masters


def learning_rate(config: TrainConfig, step: int) -> float:
    """Learning rate of update ``step`` (counted from 0): linear warm-up, then the official linear anneal.

    The official loop sets the annealed rate *after* each step, so updates 0 and 1 both use the full rate
    and the last of ``lr_anneal_steps`` is above zero. This function reproduces that.
    """
    warmup = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    anneal = 1 - max(step - 1, 0) / config.lr_anneal_steps if config.lr_anneal_steps else 1.0
    return config.lr * warmup * max(anneal, 0.0)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


MOST_INITIAL = 0.05  # share of the EMA; above it, images are visibly noisy


def unripe(decay: float, step: int, instead: str = "sample with --weights model") -> str | None:
    """A one-line warning if, after ``step`` updates, an EMA of ``decay`` is still more than 5% initial
    weights, else None; ``instead``: a further remedy to suggest."""
    share = decay**step
    if share <= MOST_INITIAL:
        return None
    return (
        f"warning: after {step} steps the EMA (train.ema_decay={decay:g}) is still {share:.0%} initial "
        f"weights, so samples may be noise; train longer, lower train.ema_decay, or {instead}"
    )


def check_decay(decay: float) -> None:
    """``UserError`` for an EMA's decay out of range."""
    if not 0 <= decay < 1:
        raise UserError(f"train.ema_decay: got {decay}, expected [0, 1)")


class Ema:
    """An exponential moving average of a model's parameters: ``ema = decay * ema + (1 - decay) * param``.

    ``tensors``: the averages by name, laid out and sharded like the parameters. They start as copies
    (float32 copies of bfloat16 parameters). The attached optimiser updates them in every step it does not
    skip.
    """

    def __init__(self, model: nn.Module, decay: float):
        check_decay(decay)
        self.decay, self.model = decay, model
        self.tensors = {
            name: p.detach().float() if p.dtype == torch.bfloat16 else p.detach().clone()
            for name, p in model.named_parameters()
        }

    def attach(self, optimizer: FusedAdan | FusedAdamW) -> None:
        """Have ``optimizer``, which is over parameters of the model, update their averages."""
        copies = {p: self.tensors[name] for name, p in self.model.named_parameters()}
        trained = [p for group in optimizer.param_groups for p in group["params"]]
        optimizer.add_ema([copies[p] for p in trained], self.decay)

    @contextmanager
    def in_model(self) -> Iterator[nn.Module]:
        """Within the block the model has the EMA weights, in eval mode; then its own again, bit for bit."""
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
            # Weights gathered before are those about to be swapped out.
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
    """The loss scale for float16: halved after a step with a non-finite gradient, doubled after ``patience``
    good ones. It stays on the device, so nothing waits for it."""

    LARGEST = 2.0**24

    def __init__(self, device: torch.device, patience: int = 2000):
        self.patience = patience
        self.scale = torch.full((), 2.0**16, dtype=torch.float32, device=device)
        self.good = torch.zeros((), dtype=torch.float32, device=device)

    def unscale(self, optimizer: torch.optim.Optimizer) -> None:
        """Divide the gradients by the scale, in place."""
        params = [p for group in optimizer.param_groups for p in group["params"]]
        grads = [local(p.grad) for p in params if p.grad is not None]
        torch._foreach_mul_(grads, 1 / self.scale)

    def update(self, grad_norm: Tensor) -> None:
        """Update the scale after a step whose gradient had norm ``grad_norm``."""
        finite = grad_norm.isfinite()
        self.good = torch.where(finite, self.good + 1, 0)
        grow = self.good >= self.patience
        self.good = torch.where(grow, 0, self.good)
        factor = torch.where(finite, torch.where(grow, 2.0, 1.0), 0.5)
        self.scale = (self.scale * factor).clamp(1.0, self.LARGEST)
