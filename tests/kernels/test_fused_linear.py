"""The tests of ``fused_linear.py``, with the implementation for CPUs: plain PyTorch."""

from fused_linear import *  # noqa: F403
