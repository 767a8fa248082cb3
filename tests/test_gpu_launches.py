"""What the host leaves out of a call on a GPU: Triton's own Python, and casts that autocast keeps."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from mdt_fast import MDTv2, kernels

pytestmark = pytest.mark.gpu


@pytest.fixture
def launcher(monkeypatch: pytest.MonkeyPatch) -> Any:
    module = pytest.importorskip("mdt_fast.kernels.launcher")
    monkeypatch.setattr(module, "_compiled", {})
    return module


def outcome(x: Tensor, y: Tensor, m: tuple[Tensor, ...]) -> list[Tensor]:
    """Results and gradients of calls that launch kernels with up to forty arguments."""
    tensors = [a.detach().requires_grad_() for a in (x, y, *m)]
    x, y, gate, shift, scale = tensors
    r, normal = kernels.gate_residual_ln_modulate(x, y, gate, shift, scale)
    D = x.shape[2]
    qkv = torch.stack([r, normal, y], dim=2).unflatten(-1, (D // 8, 8))
    out = kernels.rel_attention_qkvpacked(qkv, None).flatten(2)
    out = kernels.bias_gelu(out, shift[0])
    return [r, normal, out, *torch.autograd.grad((r.sum() + out.square().sum()), tensors)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_same_bits_as_by_triton_s_own_launches(
    dtype: torch.dtype, launcher: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In numbers that Triton compiles for by themselves (1, multiples of 16), addresses between two multiples
    of 16 bytes, and on another stream."""
    for B, L, D, start in [(1, 1, 8, 0), (2, 17, 24, 0), (2, 16, 64, 0), (2, 17, 24, 1), (2, 16, 64, 1)]:
        x, y = torch.randn(2, B * L * D + start, device="cuda").to(dtype)[:, start:].view(2, B, L, D)
        m = torch.randn(B, 3 * D, device="cuda").to(dtype).chunk(3, dim=1)
        with monkeypatch.context() as patch:
            patch.setattr(launcher, "KNOWN", False)
            expected = outcome(x, y, m)
        first, again = outcome(x, y, m), outcome(x, y, m)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            aside = outcome(x, y, m)
        torch.cuda.current_stream().wait_stream(stream)
        for results in (first, again, aside):
            assert all(map(torch.equal, results, expected))
    assert launcher._compiled


def test_weights_are_cast_once_for_passes_under_one_autocast() -> None:
    torch.manual_seed(0)
    model = MDTv2(input_size=8, hidden_size=64, depth=4, num_heads=4, num_classes=10).cuda().eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.05)
    x, t = torch.randn(2, 4, 8, 8, device="cuda"), torch.tensor([3, 5], device="cuda")

    def casts() -> tuple[Tensor, int]:
        with profile(activities=[ProfilerActivity.CPU]) as seen:
            out = model(x, t, t)
        return out, sum(e.count for e in seen.key_averages() if e.key == "aten::_to_copy")

    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        (first, all_of_them), _, (third, some) = casts(), casts(), casts()
    assert torch.equal(first, third)
    assert all_of_them - some >= 4 * 3 * 2  # of each block qkv, proj and fc2, weights and biases


def test_written_weights_are_cast_again() -> None:
    """Also under an autocast around everything, and for gradients after passes without."""
    torch.manual_seed(0)
    model = MDTv2(input_size=8, hidden_size=64, depth=2, num_heads=4, num_classes=10, decode_layer=1)
    model = model.cuda().eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.05)
    x, t = torch.randn(2, 4, 8, 8, device="cuda"), torch.tensor([3, 5], device="cuda")

    weights = [block.attn.qkv.weight for block in model.every_block()]

    def results() -> list[Tensor]:
        with torch.no_grad():
            out = model(x, t, t)
        gradients = torch.autograd.grad(model(x, t, t).float().sum(), weights, allow_unused=True)
        return [out, *(g for g in gradients if g is not None)]  # a side block has none

    with torch.autocast("cuda", torch.bfloat16):
        for factor in (1.0, 1.25, 0.5):
            with torch.no_grad():
                for p in weights:
                    p.mul_(factor)
            ours = results()
            with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
                expected = results()
            assert all(map(torch.equal, ours, expected))
