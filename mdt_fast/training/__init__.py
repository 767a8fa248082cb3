"""Training: optimisers, checkpoints, metrics and the loop."""

from ..optim import FusedAdamW, FusedAdan
from .loop import Result, train
from .optim import Ema, build_optimizer
from .run import load_run
from .step import TrainingStep

__all__ = ["Ema", "FusedAdamW", "FusedAdan", "Result", "TrainingStep", "build_optimizer", "load_run", "train"]
