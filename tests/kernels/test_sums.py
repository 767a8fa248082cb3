"""The tests of ``sums.py``, with the implementation for CPUs: plain PyTorch."""

from sums import *  # noqa: F403
