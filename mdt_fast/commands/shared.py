"""What several commands need."""

import argparse

import torch

from ..errors import UserError


def set_threads(threads: int | None) -> None:
    if threads is None:
        return
    if threads < 1:
        raise UserError(f"--threads: must be at least 1, got {threads}")
    torch.set_num_threads(threads)


def refuse_empty(args: argparse.Namespace, *names: str) -> None:
    for name in names:
        if getattr(args, name) == "":
            raise UserError(f"--{name}: a name is needed, got ''")
