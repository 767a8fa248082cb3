"""The tests of ``sums.py``, with what serves a CPU: plain PyTorch."""

from sums import *  # noqa: F403
