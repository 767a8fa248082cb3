"""The tests of ``float8.py``, with the Triton kernels in the interpreter."""

import numpy as np
import pytest
import torch

from float8 import *  # noqa: F403
from float8 import DTYPES, SHAPES, reference, spread
from mdt_fast import kernels
from mdt_fast.kernels.backends import INTERPRETING

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.skipif(not INTERPRETING, reason="needs TRITON_INTERPRET=1 in the environment"),
]


@pytest.fixture(autouse=True)
def rounds_as_gpus_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton 3.7's interpreter does not: it drops the carry into the exponent and truncates below 2^-6."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    theirs = InterpreterBuilder.create_fp_to_fp

    def create_fp_to_fp(self, src, dst_type, rounding_mode):  # type: ignore[no-untyped-def]
        if dst_type.scalar != tl.float8e4nv:
            return theirs(self, src, dst_type, rounding_mode)
        data = torch.from_numpy(np.ascontiguousarray(src.data)).clamp(-448, 448)
        rounded = data.to(torch.float8_e4m3fn).view(torch.uint8).numpy()
        return TensorHandle(rounded.reshape(src.data.shape), dst_type.scalar)

    monkeypatch.setattr(InterpreterBuilder, "create_fp_to_fp", create_fp_to_fp)


@DTYPES
@SHAPES
@pytest.mark.parametrize("with_factor", [False, True])
def test_the_same_bits_as_the_reference(R: int, D: int, dtype: torch.dtype, with_factor: bool) -> None:
    x, factor = (
        spread(R, D).to(dtype),
        torch.exp2(torch.randint(-9, 9, (D,)).float()) if with_factor else None,
    )
    for a, e in zip(
        kernels.quantize_rows(x, factor=factor), reference.quantize_rows(x.float(), None, factor), strict=True
    ):
        assert torch.equal(a.float(), e.float())
