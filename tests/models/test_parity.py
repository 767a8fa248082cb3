"""The fast model against the reference: same weights, same plan, published head sizes, every gradient."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mdt_fast import DiT, MaskPlan, MDTv2, from_reference, models, reference
from tolerances import FLOAT32, FLOAT64, relative_error

SHAPES: dict[str, dict[str, Any]] = {
    "head 64": {"hidden_size": 128, "num_heads": 2},
    "head 72": {"hidden_size": 144, "num_heads": 2},
}


def pair(family: str, dtype: torch.dtype, **kwargs: Any) -> tuple[nn.Module, nn.Module]:
    """A reference model with random weights everywhere, and a fast one with copies of them."""
    classes = {"mdtv2": reference.MDTv2, "mdt": reference.MDT, "dit": reference.DiT}
    masks = {} if family == "dit" else {"mask_ratio": 0.3, "decode_layer": 2}
    oracle = classes[family](input_size=16, depth=4, num_classes=10, **masks, **kwargs).to(dtype).eval()
    for parameter in oracle.parameters():
        nn.init.normal_(parameter, std=0.05)
    fast = from_reference(oracle)
    for parameter_name, parameter in list(fast.named_parameters()):
        owner, _, leaf = parameter_name.rpartition(".")
        copied = nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)
        setattr(fast.get_submodule(owner), leaf, copied)
    return oracle, fast


def batch(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(3, 4, 16, 16, dtype=dtype), torch.tensor([0, 500, 999]), torch.tensor([1, 9, 10])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("family", "len_keep"),
    [("dit", None), *itertools.product(["mdtv2", "mdt"], [None, 64, 37, 1, 0])],
    ids=lambda v: v if isinstance(v, str) else f"keep {'all' if v is None else v}",
)
def test_forward_and_every_gradient(
    family: str, len_keep: int | None, shape: str, dtype: torch.dtype
) -> None:
    oracle, fast = pair(family, dtype, **SHAPES[shape])
    x, t, y = batch(dtype)
    plan = {} if len_keep is None else {"mask_plan": MaskPlan.from_noise(torch.rand(3, 64), len_keep)}
    tolerance = FLOAT64 if dtype == torch.float64 else FLOAT32
    x_oracle, x_fast = x.clone().requires_grad_(), x.clone().requires_grad_()
    expected, actual = oracle(x_oracle, t, y, **plan), fast(x_fast, t, y, **plan)
    assert relative_error(actual, expected) < tolerance
    w = torch.randn_like(expected)
    (expected * w).sum().backward()
    (actual * w).sum().backward()
    assert relative_error(x_fast.grad, x_oracle.grad) < tolerance
    for (name, a), e in zip(fast.named_parameters(), oracle.parameters(), strict=True):
        if a.grad is None or e.grad is None:  # an unused side block may be skipped
            assert all(grad is None or not grad.any() for grad in (a.grad, e.grad)), name
        elif name.endswith("qkv.bias"):  # without key biases: their exact gradient is zero
            D = a.shape[0] // 3
            for part in (slice(0, D), slice(2 * D, 3 * D)):
                assert relative_error(a.grad[part], e.grad[part]) < tolerance, name
        else:
            assert relative_error(a.grad, e.grad) < tolerance, name


@pytest.mark.parametrize("family", ["mdtv2", "mdt"])
def test_the_same_seed_gives_the_same_masks_and_drops(family: str) -> None:
    oracle, fast = pair(family, torch.float32, **SHAPES["head 64"])
    x, t, y = batch(torch.float32)
    oracle.train()
    fast.train()
    for enable_mask in (False, True):
        torch.manual_seed(7)
        expected = oracle(x, t, y, enable_mask=enable_mask)
        torch.manual_seed(7)
        assert relative_error(fast(x, t, y, enable_mask=enable_mask), expected) < FLOAT32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_casting_the_whole_model(dtype: torch.dtype) -> None:
    """Every dtype runs (the official model fails in its timestep embedder) and stays near float32."""
    oracle, fast = pair("mdtv2", torch.float32, **SHAPES["head 72"])
    x, t, y = batch(torch.float32)
    plan = MaskPlan.from_noise(torch.rand(3, 64), 37)
    expected = oracle(x, t, y, mask_plan=plan)
    plain = relative_error(oracle.to(dtype)(x.to(dtype), t, y, mask_plan=plan), expected)
    out = fast.to(dtype)(x.to(dtype), t, y, mask_plan=plan)
    assert out.dtype == dtype
    assert relative_error(out, expected) <= max(2 * plain, FLOAT32)


def test_bfloat16_autocast() -> None:
    oracle, fast = pair("mdtv2", torch.float32, **SHAPES["head 64"])
    x, t, y = batch(torch.float32)
    plan = MaskPlan.from_noise(torch.rand(3, 64), 37)
    expected = oracle(x, t, y, mask_plan=plan)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain, out = oracle(x, t, y, mask_plan=plan), fast(x, t, y, mask_plan=plan)
    assert relative_error(out, expected) <= 2 * relative_error(plain, expected)
    out.float().square().mean().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in fast.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("cls", [MDTv2, DiT])
def test_compiles_without_graph_breaks(cls: Any) -> None:
    model = cls(input_size=8, hidden_size=32, depth=4, num_heads=2, num_classes=10).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.05)
    compiled = torch.compile(model, fullgraph=True)
    x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([3, 900]), torch.tensor([1, 2])
    assert relative_error(compiled(x, t, y), model(x, t, y)) < FLOAT32


def test_guidance_ignores_the_second_half_of_the_input() -> None:
    _, fast = pair("mdtv2", torch.float32, **SHAPES["head 64"])
    x, t, y = torch.randn(4, 4, 16, 16), torch.full((4,), 300), torch.tensor([1, 2, 10, 10])
    other = torch.cat([x[:2], torch.randn(2, 4, 16, 16)])
    with torch.no_grad():
        assert torch.equal(
            fast.forward_with_cfg(x, t, y, cfg_scale=3.0), fast.forward_with_cfg(other, t, y, cfg_scale=3.0)
        )
        constant = fast.forward_with_cfg(x, t, y, cfg_scale=3.0, scale_pow=None)
        cond, uncond = fast(torch.cat([x[:2], x[:2]]), t, y).chunk(2)
    guided = uncond[:, :3] + 3.0 * (cond[:, :3] - uncond[:, :3])
    assert relative_error(constant[:2, :3], guided) < FLOAT32
    assert torch.equal(constant[2:, 3:], uncond[:, 3:])
    assert torch.equal(constant[:2, 3:], cond[:, 3:])


@pytest.mark.parametrize("channels", [1, 2])
def test_few_channels_never_guide_the_variance(channels: int) -> None:
    model = MDTv2(
        input_size=8,
        in_channels=channels,
        hidden_size=16,
        depth=2,
        num_heads=2,
        num_classes=10,
        decode_layer=0,
    )
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.05)
    model.eval()
    x, t, y = torch.randn(2, channels, 8, 8), torch.tensor([100, 100]), torch.tensor([1, 10])
    with torch.no_grad():
        guided = model.forward_with_cfg(x, t, y, cfg_scale=5.0)
        raw = model(x[:1].repeat(2, 1, 1, 1), t, y)
    assert torch.equal(guided[:, channels:], raw[:, channels:])
    assert not torch.equal(guided[:, :channels], raw[:, :channels])


@pytest.mark.parametrize("module", [models, reference], ids=["fast", "reference"])
def test_dit_guides_by_a_constant(module: Any) -> None:
    model = module.DiT(input_size=8, hidden_size=16, depth=2, num_heads=2, num_classes=10).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.05)
    x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([900, 900]), torch.tensor([1, 10])
    with torch.no_grad():
        cond, uncond = model(torch.cat([x[:1], x[:1]]), t, y).chunk(2)
        guided = model.forward_with_cfg(x, t, y, 3.0)
        scheduled = model.forward_with_cfg(x, t, y, 3.0, scale_pow=4.0)
    assert relative_error(guided[:1, :3], uncond[:, :3] + 3.0 * (cond - uncond)[:, :3]) < FLOAT32
    assert relative_error(scheduled[:1, :3], guided[:1, :3]) > 0.01
