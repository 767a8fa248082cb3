"""The tests of ``float8.py``, with what serves a CPU: plain PyTorch."""

from float8 import *  # noqa: F403
