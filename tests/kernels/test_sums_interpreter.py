"""The tests of ``sums.py``, with the Triton kernel in the interpreter."""

import pytest
import torch

from mdt_fast.kernels.sums.op import sum_rows_fwd
from sums import *  # noqa: F403

pytestmark = pytest.mark.interpreter


def test_opcheck() -> None:
    torch.library.opcheck(sum_rows_fwd.overload, (torch.randn(70, 8, requires_grad=True), torch.float16))
