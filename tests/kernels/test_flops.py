"""torch's ``FlopCounterMode`` counts attention by our ops as it counts attention written as products."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mdt_fast import MDTv2, Switches, from_reference, reference
from mdt_fast.kernels import rel_attention, rel_attention_qkvpacked
from mdt_fast.masking import MaskPlan

SHAPE: dict[str, Any] = {"input_size": 8, "hidden_size": 32, "depth": 4, "num_heads": 2, "num_classes": 10}
B, L, H, d = 3, 16, 2, 8


def counted(call: Callable[[], object]) -> dict[str, int]:
    with FlopCounterMode(display=False) as counter:
        call()
    return {str(op): number for op, number in counter.get_flop_counts()["Global"].items()}


def attention(found: dict[str, int]) -> int:
    return sum(number for op, number in found.items() if "attention" in op or "bmm" in op)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("kind", ["DiT", "MDTv2"])
@pytest.mark.parametrize("grad", [False, True], ids=["forward", "backward"])
def test_attention_is_counted_as_in_the_reference(kind: str, dtype: torch.dtype, grad: bool) -> None:
    shape = SHAPE | ({} if kind == "DiT" else {"decode_layer": 2})
    oracle = getattr(reference, kind)(**shape).to(dtype).eval()
    x = torch.randn(B, 4, 8, 8, dtype=dtype)
    t, y = torch.arange(B), torch.arange(B)
    found = []
    for model in (oracle, from_reference(oracle)):
        with torch.set_grad_enabled(grad):
            found.append(counted(lambda: model(x, t, y).sum().backward() if grad else model(x, t, y)))  # noqa: B023
    assert attention(found[0]) == attention(found[1]) > 0
    if kind == "DiT" and grad:  # MDTv2's thin skip has fewer products
        assert sum(found[0].values()) == sum(found[1].values())


def test_samples_of_different_lengths_count_by_their_own() -> None:
    lengths = [3, 16, 0, 5]
    offsets = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    pos = torch.cat([torch.arange(n) for n in lengths])
    qkv = torch.randn(sum(lengths), 3, H, d, requires_grad=True)
    table = torch.randn(52, H, requires_grad=True)
    ragged: dict[str, Any] = {"grid_size": 4, "attention_backend": "samples"}
    found = counted(
        lambda: rel_attention_qkvpacked(
            qkv, table, pos=pos, offsets=offsets, max_length=16, **ragged
        ).sum().backward()
    )  # fmt: skip
    assert attention(found) == 3 * 4 * H * d * sum(n * n for n in lengths)
    q, k, v = qkv.unbind(1)
    found = counted(
        lambda: rel_attention(
            q, k, v, table, q_pos=pos, k_pos=pos, q_offsets=offsets, max_q=16, **ragged
        ).sum().backward()
    )  # fmt: skip
    assert attention(found) == 3 * 4 * H * d * sum(n * n for n in lengths)


def test_a_packed_step_counts_both_passes() -> None:
    model = MDTv2(**SHAPE, decode_layer=2, mask_ratio=0.3).train()
    x, t, y = torch.randn(B, 4, 8, 8), torch.arange(B), torch.arange(B)
    plan = MaskPlan.from_noise(torch.rand(B, L), 9)
    found = []
    for packed in (True, False):
        model.set_switches(Switches(packed=packed))
        found.append(
            counted(lambda: sum(model.training_step_outputs(x, x, t, y, mask_plan=plan)).sum().backward())
        )
    assert attention(found[0]) == attention(found[1]) > 0
