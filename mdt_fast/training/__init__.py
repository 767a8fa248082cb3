"""Training: optimisers, checkpoints, metrics and the loop."""

from .loop import Result, train
from .optim import AdamW, Adan, Ema, build_optimizer

__all__ = ["AdamW", "Adan", "Ema", "Result", "build_optimizer", "train"]
