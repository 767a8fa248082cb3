"""Classifier-free guidance: golden scales and outputs, closed forms, and mistakes."""

import math

import pytest
import torch

from golden_files import load, meta
from mdt_fast import MDTv2
from mdt_fast.diffusion import channels_to_guide, guide, power_cosine_scale
from mdt_fast.errors import UserError
from tolerances import FLOAT32, relative_error

MODELS = ["v2_main", "v1_main", "v2_alt", "v1_alt", "v2_nomask", "v2_f64"]


@pytest.mark.parametrize("name", MODELS)
def test_golden_scale(name: str) -> None:
    golden = load(f"{name}.cases")
    for i, (cfg_scale, scale_pow) in enumerate(meta(f"{name}.cases")["cfg_pairs"]):
        scale = power_cosine_scale(golden["d/t"], cfg_scale, scale_pow=scale_pow)
        assert scale.dtype == torch.float32
        assert relative_error(scale, golden[f"d/scale_{i}"]) <= FLOAT32


@pytest.mark.parametrize("pair", [0, 1])
def test_golden_guidance_v2_main(pair: int) -> None:
    golden = load("v2_main.cases")
    cond, uncond = golden["d/raw"].chunk(2)
    guided = guide(cond, uncond, golden[f"d/scale_{pair}"][: len(cond)], channels=3)
    assert relative_error(guided, golden[f"d/out_{pair}"]) <= FLOAT32


def test_scale_rises_from_one_to_cfg_scale() -> None:
    t = torch.arange(1000, -1, -1)
    scale = power_cosine_scale(t, 3.8)
    assert scale[0] == 1
    assert scale[-1].item() == pytest.approx(3.8)
    assert (scale.diff() >= 0).all()
    assert power_cosine_scale(torch.tensor([999]), 3.8, scale_pow=0.01).item() == pytest.approx(
        3.77, abs=5e-3
    )
    expected = 1 + 2.8 * (1 - math.cos(math.pi * 0.75**4)) / 2
    assert power_cosine_scale(torch.tensor([250]), 3.8).item() == pytest.approx(expected)


def test_scale_is_float32_and_takes_any_t() -> None:
    t = torch.tensor([0, 250, 999])
    for dtype in (torch.int32, torch.float32, torch.float64):
        assert torch.equal(power_cosine_scale(t.to(dtype), 2.0), power_cosine_scale(t, 2.0))
    constant = power_cosine_scale(t, 2.0, scale_pow=None)
    assert constant.dtype == torch.float32
    assert constant.tolist() == [2, 2, 2]


def test_a_scale_for_each_row_of_the_batch() -> None:
    """The official ``forward_with_cfg`` takes one for each of 2n rows, and reads the first n."""
    t, scales = torch.tensor([0, 250]), torch.tensor([1.5, 2.5, 9.0, 9.0])
    assert torch.equal(power_cosine_scale(t, scales), power_cosine_scale(t, scales[:2]))


@pytest.mark.parametrize("scale_pow", [None, 4.0])
def test_a_scale_for_each_sample(scale_pow: float | None) -> None:
    t, scales = torch.tensor([0, 250, 999]), torch.tensor([1.0, 2.5, 4.0], dtype=torch.float64)
    found = power_cosine_scale(t, scales, scale_pow=scale_pow)
    alone = [power_cosine_scale(t[i : i + 1], scales[i].item(), scale_pow=scale_pow) for i in range(3)]
    assert torch.equal(found, torch.cat(alone))
    model = MDTv2(input_size=8, hidden_size=16, depth=2, num_heads=2, num_classes=10, decode_layer=0).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x, y = torch.randn(3, 4, 8, 8).repeat(2, 1, 1, 1), torch.tensor([1, 2, 3, 10, 10, 10])
    with torch.no_grad():
        both = model.forward_with_cfg(x, t.repeat(2), y, scales, scale_pow=scale_pow)
        second = model.forward_with_cfg(x, t.repeat(2), y, 2.5, scale_pow=scale_pow)
    torch.testing.assert_close(both[1], second[1])
    assert not torch.allclose(both[0], second[0])
    with pytest.raises(UserError, match=r"cfg_scale: got \[2\], expected a number or \[3\]"):
        power_cosine_scale(t, scales[:2])


def test_guide_leaves_other_channels_to_each_half() -> None:
    cond, uncond = torch.randn(2, 3, 8, 4, 4)
    out = guide(cond, uncond, 2.5, channels=3)
    first, second = out.chunk(2)
    assert torch.equal(first[:, :3], second[:, :3])
    assert relative_error(first[:, :3], 2.5 * cond[:, :3] - 1.5 * uncond[:, :3]) <= FLOAT32
    assert torch.equal(first[:, 3:], cond[:, 3:])
    assert torch.equal(second[:, 3:], uncond[:, 3:])
    assert torch.equal(out, guide(cond, uncond, torch.full((3,), 2.5), channels=3))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"t": torch.tensor([1001])}, "t: got values from 1001 to 1001, expected 0 to 1000"),
        ({"t": torch.tensor([-1, 4])}, "t: got values from -1 to 4, expected 0 to 1000"),
        ({"scale_pow": -1.0}, "scale_pow: got -1.0, expected None, or finite and at least 0"),
        ({"diffusion_steps": 0}, "diffusion_steps: got 0, expected 1 or more"),
    ],
)
def test_scale_refuses(kwargs: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        power_cosine_scale(**{"t": torch.tensor([0]), "cfg_scale": 2.0, **kwargs})


def test_guide_refuses() -> None:
    x = torch.zeros(2, 8, 4, 4)
    with pytest.raises(UserError, match=r"uncond: got .*, expected the shape of cond"):
        guide(x, x[:1], 2.0, 3)
    with pytest.raises(UserError, match="channels: got 9, expected 0 to 8"):
        guide(x, x, 2.0, 9)
    with pytest.raises(UserError, match=r"scale: got \[4\], expected a number or shape \[2\]"):
        guide(x, x, torch.ones(4), 3)


def test_scales_follow_each_other_in_one_graph() -> None:
    """At the second value the number becomes a variable of the graph."""
    torch._dynamo.reset()
    t = torch.tensor([0, 250, 999])
    scale = torch.compile(power_cosine_scale, fullgraph=True, backend="eager")
    for cfg_scale in (2.0, 3.0, 4.5):
        torch.testing.assert_close(scale(t, cfg_scale), power_cosine_scale(t, cfg_scale))


def test_a_power_that_is_no_number() -> None:
    with pytest.raises(UserError, match=r"^scale_pow: got '4', expected a number or None$"):
        power_cosine_scale(torch.tensor([0]), 2.0, scale_pow="4")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((4,), 3),
        ((3,), 3),
        ((8,), 8),
        ((4, 8, True), 3),
        ((1, 2, True), 1),
        ((8, 8, True), 3),  # four channels of noise and four of variance, four of the inputs are a condition
        ((6, 6, True), 3),
        ((8, 4, False), 3),
        ((8, 16, True), 8),
    ],
    ids=str,
)
def test_the_variance_is_not_guided(arguments: tuple[int, ...], expected: int) -> None:
    assert channels_to_guide(*arguments) == expected
