"""Sums over rows: odd shapes, one chunk and several, dtypes in and out, the same bits twice."""

import pytest
import torch

from mdt_fast.kernels.sums import sum_rows
from parity import compare
from tolerances import relative_error


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@pytest.mark.parametrize(
    ("R", "D"), [(1, 1), (63, 24), (64, 300), (1000, 40), (129, 128), (0, 8), (5, 0)], ids=str
)
def test_sum_rows(R: int, D: int, dtype: torch.dtype) -> None:
    compare(sum_rows, lambda x: x.sum(0), [torch.randn(R, D)], dtype)


def test_into_another_dtype() -> None:
    x = torch.randn(500, 3).half()
    out = sum_rows(x, torch.float32)
    assert out.dtype == torch.float32
    assert relative_error(out, x.double().sum(0)) <= torch.finfo(torch.float16).eps


def test_rows_apart() -> None:
    x = torch.randn(300, 48)
    assert relative_error(sum_rows(x[:, ::2]), x[:, ::2].double().sum(0)) < 1e-6
    assert relative_error(sum_rows(x.t()), x.double().sum(1)) < 1e-6


@pytest.mark.parametrize("dtype", [torch.int32, torch.complex64, "float32"])
def test_wrong_dtypes(dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=r"dtype: got .*, expected floating-point dtypes"):
        sum_rows(torch.ones(2, 3), dtype)


@pytest.mark.parametrize(
    ("x", "said"),
    [
        (torch.ones(3), r"x: shape \[3\], expected \[R, D\]"),
        (torch.ones(3, 2, dtype=torch.int64), "x: dtype"),
    ],
    ids=["shape", "dtype"],
)
def test_wrong_arguments(x: torch.Tensor, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        sum_rows(x)
