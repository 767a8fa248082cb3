"""What ``rel_attention`` refuses, by its message: the same on every backend."""

from typing import Any

import numpy as np
import pytest
import torch

from mdt_fast.kernels import rel_attention, rel_attention_qkvpacked
from tolerances import FLOAT32, relative_error

Q, TABLE = torch.zeros(2, 2, 16, 8), torch.zeros(52, 2)
POS = torch.arange(16).expand(2, 16)
QKV, OFFSETS = torch.zeros(16, 3, 2, 8), torch.tensor([0, 5, 16], dtype=torch.int32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grid_size": 65}, "grid_size: got 65, a table needs an integer from 1 to 64"),
        ({"grid_size": 4.0}, r"grid_size: got 4\.0, a table needs an integer from 1 to 64"),
        ({"scale": "a"}, "scale: got 'a', expected finite numbers or None"),
        ({"scale": float("nan")}, "scale: got nan, expected finite numbers or None"),
        ({"scale": 10**400}, "scale: got 10{400}, expected finite numbers or None"),
        ({"bias_form": "table"}, "bias_form: got 'table', expected lookup, dense or None"),
        ({"table_grad": "atomic"}, "table_grad: got 'atomic', expected recompute, store or None"),
        ({"q_pos": POS.int()}, r"q_pos: dtype torch.int32, expected torch.int64"),
        ({"q_pos": POS + 1}, r"q_pos: values 1\.\.16, expected 0\.\.15"),
        ({"k_pos": POS * 0}, "k_pos: two tokens of sample 0 stand at one position, expected one"),
        ({"k_pos": POS[:, :9]}, r"k_pos: shape \[2, 9\], expected \[2, 16\]"),
        ({"k_offsets": OFFSETS}, "k_offsets: given without q_offsets"),
        ({"max_q": 16}, "max_q: given without q_offsets"),
        ({"q_BHMd": Q.transpose(2, 3)}, r"k: shape \[2, 2, 16, 8\], expected \[2, 2, N, 16\]"),
        (
            {"q_BHMd": torch.zeros(2, 2, 8, 16).transpose(2, 3)},
            "q: stride 16 along the head size, expected 1",
        ),
        ({"v_BHNd": Q[:, :, :9]}, r"v: shape \[2, 2, 9, 8\], expected \[2, 2, 16, 8\]"),
        ({"table_RH": TABLE[:49]}, r"table: shape \[49, 2\], expected \[52, 2\]"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_refusals(change: dict[str, Any], message: str) -> None:
    args = {"q_BHMd": Q, "k_BHNd": Q, "v_BHNd": Q, "table_RH": TABLE, "grid_size": 4}
    with pytest.raises(ValueError, match=message):
        rel_attention(**(args | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"offsets": OFFSETS.long()}, r"offsets: torch.int64 \[3\] on cpu, expected torch.int32"),
        ({"offsets": OFFSETS.flip(0)}, "offsets: runs from 16 to 0, expected 0 to 16"),
        ({"max_length": 5}, "max_length: got 5, but offsets has a sample of 11"),
        ({"pos": None}, "pos: needed for samples of different lengths"),
        ({"pos": POS[0, :9]}, r"pos: shape \[9\], expected \[16\]"),
        ({"pos": POS[0] * 0}, "pos: two tokens of sample 0 stand at one position"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_packed_refusals(change: dict[str, Any], message: str) -> None:
    args = {"qkv_BL3Hd": QKV, "table_RH": TABLE, "grid_size": 4, "offsets": OFFSETS, "pos": POS[0]}
    with pytest.raises(ValueError, match=message):
        rel_attention_qkvpacked(**(args | change))


@pytest.mark.parametrize("dynamic", [None, True])
def test_a_scale_that_changes_stays_in_one_graph(dynamic: bool | None) -> None:
    """A second number makes it symbolic."""
    q, qkv = torch.randn(1, 2, 4, 8), torch.randn(1, 4, 3, 2, 8)

    def both(scale: float) -> list[torch.Tensor]:
        return [rel_attention(q, q, q, scale=scale), rel_attention_qkvpacked(qkv, scale=scale)]

    compiled = torch.compile(both, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for scale in (0.3, 0.4, 0.5):
        for ours, expected in zip(compiled(scale), both(scale), strict=True):
            assert relative_error(ours, expected) <= FLOAT32


@pytest.mark.parametrize("scale", [np.float32(0.5), np.float64(0.5), np.int64(1), 1], ids=repr)
def test_numbers_of_other_libraries_are_scales(scale: Any) -> None:
    q = torch.randn(1, 2, 4, 8)
    assert torch.equal(rel_attention(q, q, q, scale=scale), rel_attention(q, q, q, scale=float(scale)))
