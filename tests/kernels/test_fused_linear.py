"""The tests of ``fused_linear.py``, with what serves a CPU: plain PyTorch."""

from fused_linear import *  # noqa: F403
