"""What users get wrong: each mistake is one line that names it."""

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import mdt_fast
from mdt_fast import MDT, DiT, MaskPlan, MDTv2, UserError, compile_for_training, models, reference

TINY = {"input_size": 8, "hidden_size": 16, "depth": 4, "num_heads": 2, "num_classes": 10}


def tiny(cls: Any = MDTv2, **kwargs: Any) -> torch.nn.Module:
    settings = {"mask_ratio": 0.3, "decode_layer": 2} if cls is not DiT else {}
    return cls(**{**TINY, **settings, **kwargs})


def inputs(batch: int = 2) -> dict[str, torch.Tensor]:
    return {
        "x": torch.randn(batch, 4, 8, 8),
        "t": torch.randint(0, 1000, (batch,)),
        "y": torch.randint(0, 10, (batch,)),
    }


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x": torch.randn(2, 3, 8, 8)}, r"x: shape \[2, 3, 8, 8\], expected \[B, 4, 8, 8\]"),
        ({"x": torch.randn(2, 4, 9, 8)}, r"x: shape \[2, 4, 9, 8\]"),
        ({"x": torch.randn(4, 8, 8)}, r"x: shape \[4, 8, 8\]"),
        (
            {"x": torch.randn(2, 4, 8, 8).double()},
            r"x: dtype torch.float64, the model's weights are torch.float32",
        ),
        ({"x": torch.zeros(2, 4, 8, 8, dtype=torch.uint8)}, r"x: dtype torch.uint8"),
        ({"t": torch.zeros(3)}, r"t: shape \[3\], expected \[2\]"),
        ({"t": torch.tensor([0.0, float("inf")])}, r"t: got values 0.0..inf, expected finite"),
        ({"t": torch.tensor([0.0, float("nan")])}, r"t: got values"),
        ({"t": torch.tensor([True, False])}, r"t: dtype torch.bool"),
        ({"y": torch.zeros(2)}, r"y: dtype torch.float32, expected torch.int64"),
        ({"y": torch.tensor([0, 11])}, r"y: labels 0..11, expected 0..10 \(the last is the null class\)"),
        ({"y": torch.tensor([-1, 3])}, r"y: labels -1..3"),
        ({"y": torch.zeros(2, 1, dtype=torch.int64)}, r"y: shape \[2, 1\]"),
    ],
)
@pytest.mark.parametrize("cls", [MDTv2, MDT, DiT])
def test_wrong_inputs(cls: Any, changed: dict[str, torch.Tensor], message: str) -> None:
    with pytest.raises(UserError, match=message):
        tiny(cls)(**{**inputs(), **changed})


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x_masked": torch.randn(2, 4, 9, 8)}, r"^x_masked: shape \[2, 4, 9, 8\], expected \[B, 4, 8, 8\]"),
        (
            {"x_masked": torch.randn(3, 4, 8, 8)},
            r"^t: shape \[2\], expected \[3\] \(one per sample of x_masked\)",
        ),
        ({"y_masked": torch.tensor([0, 11])}, r"^y_masked: labels 0..11, expected 0..10"),
        ({"y_masked": torch.zeros(2)}, r"^y_masked: dtype torch.float32"),
        ({"y_masked": torch.zeros(3, dtype=torch.int64)}, r"^y_masked: shape \[3\], expected \[2\]"),
        ({"y_masked": 3}, r"^y_masked: got int, expected a torch.Tensor"),
        ({"y": torch.tensor([0, 11])}, r"^y: labels 0..11"),
    ],
)
def test_wrong_inputs_of_the_second_pass(
    compiled: bool, changed: dict[str, torch.Tensor], message: str
) -> None:
    model = tiny(MDTv2).train()
    if compiled:
        compile_for_training(model, "model")
    good = inputs()
    step = {"x_full": good["x"], "x_masked": good["x"], "t": good["t"], "y": good["y"]}
    with pytest.raises(UserError, match=message):
        model.training_step_outputs(**{**step, **changed})


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"input_size": 9}, r"input_size: got 9, expected a multiple of patch_size 2, such as 8 or 10"),
        ({"hidden_size": 30}, r"hidden_size: got 30, expected a multiple of num_heads 2 and of 4"),
        ({"depth": 0}, r"depth: got 0"),
        ({"num_heads": -1}, r"num_heads: got -1"),
        ({"mask_ratio": 0.9}, r"mask_ratio: got 0.9, expected 0..0.8"),
        ({"mask_ratio": "a lot"}, r"mask_ratio: got 'a lot'"),
        ({"decode_layer": 5}, r"decode_layer: got 5, expected 0..4"),
        ({"decode_layer": "deep"}, r"decode_layer: got 'deep'"),
        ({"class_dropout_prob": 1.5}, r"class_dropout_prob: got 1.5"),
        ({"mlp_ratio": 0}, r"mlp_ratio: got 0"),
        ({"mlp_ratio": float("inf")}, r"mlp_ratio: got inf"),
        ({"mlp_ratio": "4"}, r"mlp_ratio: got 4"),
        ({"depth": "4"}, r"depth: got '4', expected an integer"),
        ({"hidden_size": 32.0}, r"hidden_size: got 32.0, expected an integer"),
        ({"mask_ratio": [0.3]}, r"mask_ratio: got \[0.3\]"),
        ({"decode_layer": 1.5}, r"decode_layer: got 1.5"),
    ],
)
@pytest.mark.parametrize("module", [models, reference], ids=["fast", "reference"])
def test_wrong_constructor(module: Any, kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        tiny(module.MDTv2, **kwargs)


def test_v1_needs_a_decoder() -> None:
    with pytest.raises(UserError, match=r"decode_layer: got 0, expected 1..4 \(depth\) for mdt"):
        tiny(MDT, decode_layer=0)


def test_decode_layer_none_is_the_published_depth() -> None:
    assert MDTv2(**{**TINY, "depth": 8}).decode_layer == 4
    assert MDT(**TINY).decode_layer == 2


def test_strings_from_a_command_line() -> None:
    model = MDTv2(**TINY, mask_ratio="0.3", decode_layer="2")
    assert model.mask_ratio == 0.3
    assert len(model.de_blocks) == 2


def test_dit_takes_no_mask() -> None:
    with pytest.raises(UserError, match="DiT takes neither mask_ratio nor decode_layer"):
        DiT(**TINY, mask_ratio=0.3)


def test_a_plan_that_does_not_fit() -> None:
    model = tiny()
    with pytest.raises(UserError, match="mask_plan: is for 3 samples of 16 tokens, the input has 2 of 16"):
        model(**inputs(), mask_plan=MaskPlan.from_noise(torch.rand(3, 16), 8))
    with pytest.raises(UserError, match="mask_plan: is for 2 samples of 64 tokens"):
        model(**inputs(), mask_plan=MaskPlan.from_noise(torch.rand(2, 64), 8))


@pytest.mark.parametrize("name", ["x", "t", "y"])
def test_no_tensor(name: str) -> None:
    with pytest.raises(UserError, match=f"{name}: got list, expected a torch.Tensor"):
        tiny()(**{**inputs(), name: [1, 2]})
    with pytest.raises(UserError, match="mask_plan: got int, expected a MaskPlan or None"):
        tiny()(**inputs(), mask_plan=3)


@pytest.mark.parametrize("cfg_scale", [float("nan"), float("inf")])
def test_guidance_must_be_finite(cfg_scale: float) -> None:
    with pytest.raises(UserError, match=r"cfg_scale: got .*, expected a finite number"):
        tiny().forward_with_cfg(**inputs(), cfg_scale=cfg_scale)


def test_functional_transforms() -> None:
    model, batch = tiny(), inputs()
    parameters = dict(model.named_parameters())

    def loss(parameters: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(model, parameters, (x[None], batch["t"][:1], batch["y"][:1])).sum()

    model.eval()
    per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, batch["x"])
    assert per_sample["pos_embed"].shape == (2, 1, 16, 16)


@pytest.mark.parametrize("cls", [MDTv2, MDT, DiT])
def test_fake_tensors(cls: Any) -> None:
    """On a CPU: their values cannot be checked."""
    with FakeTensorMode():
        model, given = tiny(cls), inputs(4)
        assert model(**given).shape == (4, 8, 8, 8)
        assert model.forward_with_cfg(**given, cfg_scale=2.0, scale_pow=4.0).shape == (4, 8, 8, 8)
        losses = mdt_fast.create_diffusion("").training_losses(
            model, given["x"], given["t"], {"y": given["y"]}
        )
        losses["loss"].sum().backward()
    assert model.final_layer.linear.weight.grad.shape == model.final_layer.linear.weight.shape


def test_a_frozen_mask_token_stays_frozen_without_a_mask_ratio_in_between() -> None:
    model = tiny().requires_grad_(False)
    for ratio in (None, 0.3, None, 0.4):
        model.mask_ratio = ratio
        assert not any(parameter.requires_grad for parameter in model.parameters())
    model.mask_token.requires_grad_()
    model.mask_ratio = None
    assert not model.mask_token.requires_grad
    model.mask_ratio = 0.3
    assert model.mask_token.requires_grad


def test_labels_are_dropped_on_the_host_whatever_the_default_device() -> None:
    model, y = tiny(class_dropout_prob=0.5).train(), torch.arange(10)
    torch.manual_seed(0)
    expected = model.drop_labels(y)
    torch.manual_seed(0)
    with torch.device("meta"):
        assert torch.equal(model.drop_labels(y), expected)
    assert 0 < (expected == 10).sum() < 10


def test_guidance_needs_an_even_batch() -> None:
    with pytest.raises(UserError, match="x: got a batch of 3, expected an even one"):
        tiny().forward_with_cfg(**inputs(3), cfg_scale=2.0)
    bad = {**inputs(2), "t": torch.tensor([1001, 1001])}
    with pytest.raises(UserError, match=r"t: got values from .*, expected 0 to 1000"):
        tiny().forward_with_cfg(**bad, cfg_scale=2.0)


def test_unknown_names() -> None:
    with pytest.raises(UserError, match=r"model: got 'MDTv2_S2' \(did you mean 'MDTv2_S_2'\?\)"):
        models.make("MDTv2_S2")
    with pytest.raises(UserError, match=r"implementation: got 'fats' \(did you mean 'fast'\?\)"):
        models.make("MDTv2_S_2", implementation="fats")
    with pytest.raises(AttributeError, match="MDTv3"):
        _ = mdt_fast.MDTv3
    assert mdt_fast.MDTv2_XL_2 is models.FACTORIES["MDTv2_XL_2"]
    assert "MDTv2_XL_2" in dir(mdt_fast)
    everything: dict[str, object] = {}
    exec("from mdt_fast import *", everything)
    assert everything["MDTv2_XL_2"] is mdt_fast.MDTv2_XL_2
    assert everything["Switches"] is mdt_fast.Switches


@pytest.mark.parametrize("batch", [0, 1])
def test_empty_and_single_batches(batch: int) -> None:
    model = tiny()
    out = model(**inputs(batch), enable_mask=True)
    assert out.shape == (batch, 8, 8, 8)


@pytest.mark.parametrize("part", ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "adaLN_modulation.1"])
@pytest.mark.parametrize("how", ["backward hook", "own forward"])
def test_a_layer_that_is_watched_runs_itself(how: str, part: str) -> None:
    """Tools that wrap layers rely on it: they see every call."""
    torch.manual_seed(0)
    model = mdt_fast.MDTv2(
        input_size=8, depth=4, hidden_size=32, num_heads=2, num_classes=3, mask_ratio=0.3, decode_layer=2
    )
    layer, seen = model.en_inblocks[0].get_submodule(part), []
    if how == "own forward":
        plain = layer.forward
        layer.forward = lambda x: seen.append(x) or plain(x)
    else:
        layer.register_full_backward_hook(lambda *_: seen.append(None))
    out = model(torch.randn(2, 4, 8, 8), torch.tensor([3, 5]), torch.tensor([0, 1]))
    out.sum().backward()
    assert len(seen) == 1
