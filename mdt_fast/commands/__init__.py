"""The commands, run after their arguments are parsed."""

from .convert import convert
from .encode import encode
from .evaluate import evaluate
from .export import export
from .sample import sample
from .train import train

__all__ = ["convert", "encode", "evaluate", "export", "sample", "train"]
