"""Helpers shared by several commands."""

import argparse

import torch

from ..errors import UserError

MOST_THREADS = 1024
"""Starting more threads than this can crash the process."""


def set_threads(threads: int | None) -> None:
    if threads is None:
        return
    if not 1 <= threads <= MOST_THREADS:
        raise UserError(f"--threads: got {threads}, expected 1 to {MOST_THREADS}")
    torch.set_num_threads(threads)


def refuse_empty(args: argparse.Namespace, *names: str) -> None:
    for name in names:
        if getattr(args, name) == "":
            raise UserError(f"--{name.replace('_', '-')}: got '', expected a name")
