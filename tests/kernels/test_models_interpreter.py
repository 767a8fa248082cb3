"""Whole models on the Triton kernels in Triton's interpreter (``TRITON_INTERPRET=1``; ``make test`` does)."""

from typing import Any

import pytest
import torch
from torch import nn

from mdt_fast import MaskPlan, Switches, from_reference, reference
from mdt_fast.kernels.backends import INTERPRETING
from tolerances import FLOAT32, relative_error

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.skipif(not INTERPRETING, reason="needs TRITON_INTERPRET=1 in the environment"),
]


@pytest.mark.parametrize("len_keep", [None, 9], ids=["all", "masked"])
@pytest.mark.parametrize("cls", [reference.MDTv2, reference.MDT, reference.DiT], ids=lambda cls: cls.__name__)
def test_against_the_reference(cls: Any, len_keep: int | None) -> None:
    """Outputs and every gradient in float32, on the same weights and the same mask; head size 24."""
    if cls is reference.DiT and len_keep is not None:
        pytest.skip("DiT has no masked pass")
    torch.manual_seed(0)
    extra = {} if cls is reference.DiT else {"mask_ratio": 0.3, "decode_layer": 2}
    oracle = cls(input_size=8, hidden_size=48, depth=4, num_heads=2, num_classes=10, **extra).eval()
    for parameter in oracle.parameters():
        nn.init.normal_(parameter, std=0.05)
    fast = from_reference(oracle)
    x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([3, 900]), torch.tensor([1, 2])
    plan = {} if len_keep is None else {"mask_plan": MaskPlan.from_noise(torch.rand(2, 16), len_keep)}
    results = []
    for model in (fast, oracle):
        model.zero_grad()
        out = model(x, t, y, **plan)
        (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
        results.append(
            (
                out.detach(),
                {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None},
            )
        )
    (ours, gradients), (expected, expected_gradients) = results
    assert relative_error(ours, expected) <= FLOAT32
    assert gradients.keys() == expected_gradients.keys()
    largest = max(g.abs().max() for g in expected_gradients.values())
    for name, gradient in expected_gradients.items():
        # Key biases have gradients of zero but for rounding, so they are judged by the largest of all.
        error = (gradients[name] - gradient).abs().max()
        assert error <= 10 * FLOAT32 * max(gradient.abs().max(), 1e-3 * largest), name


@pytest.mark.parametrize("stored", [False, True], ids=["", "stored scores"])
@pytest.mark.parametrize("cls", [reference.MDTv2, reference.MDT], ids=lambda cls: cls.__name__)
def test_both_passes_in_one_batch(cls: Any, stored: bool) -> None:
    """Packed rows through every kernel: both outputs, and their joint gradients."""
    torch.manual_seed(0)
    size = {"input_size": 8, "hidden_size": 48, "depth": 4, "num_heads": 2, "num_classes": 10}
    oracle = cls(**size, mask_ratio=0.3, decode_layer=2).eval()
    for parameter in oracle.parameters():
        nn.init.normal_(parameter, std=0.05)
    fast = from_reference(oracle)
    fast.set_switches(Switches(stored_scores=stored))
    x, t, y = torch.randn(2, 2, 4, 8, 8), torch.tensor([3, 900]), torch.tensor([1, 2])
    plan = MaskPlan.from_noise(torch.rand(2, 16), 9)
    expected = oracle(x[0], t, y), oracle(x[1], t, y, mask_plan=plan)
    found = fast.training_step_outputs(x[0], x[1], t, y, mask_plan=plan)
    gradients = []
    for outputs, model in ((expected, oracle), (found, fast)):
        weights = torch.linspace(-1, 1, outputs[0].numel()).view_as(outputs[0])
        trained = [p for p in model.parameters() if p.requires_grad]
        loss = sum((out * weights).sum() for out in outputs)
        gradients.append(torch.autograd.grad(loss, trained, allow_unused=True, materialize_grads=True))
    for a, e in zip(found, expected, strict=True):
        assert relative_error(a, e) <= FLOAT32
    largest = max(g.abs().max() for g in gradients[0])
    for e, a in zip(*gradients, strict=True):
        assert (a - e).abs().max() <= 10 * FLOAT32 * max(e.abs().max(), 1e-3 * largest)
