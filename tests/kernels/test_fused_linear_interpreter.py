"""The tests of ``fused_linear.py``, with the Triton kernels in the interpreter."""

import pytest

from fused_linear import *  # noqa: F403

pytestmark = pytest.mark.interpreter
