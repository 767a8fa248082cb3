"""The tests of ``transforms.py``, with the Triton kernels in the interpreter."""

import pytest

from transforms import *  # noqa: F403

pytestmark = pytest.mark.interpreter
