"""The tests of ``test_fused_linear.py`` again, with the Triton kernels in the interpreter."""

import pytest
from test_fused_linear import *  # noqa: F403

pytestmark = pytest.mark.interpreter
