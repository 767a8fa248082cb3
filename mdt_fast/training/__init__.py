"""Training: optimisers, checkpoints, metrics and the training loop."""

from ..optim import FusedAdamW, FusedAdan
from .from_weights import load_run
from .loop import Result, train
from .optim import Ema, build_optimizer
from .step import TrainingStep

__all__ = ["Ema", "FusedAdamW", "FusedAdan", "Result", "TrainingStep", "build_optimizer", "load_run", "train"]
