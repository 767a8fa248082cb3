"""Both passes of a training step in one batch, and each switch, against the reference's two passes."""

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mdt_fast import MaskPlan, Switches, UserError, create_diffusion, from_reference, models, reference
from mdt_fast.training.objective import total_loss
from objective import two_pass_losses
from tolerances import FLOAT32, FLOAT64, relative_error

NAMES = [field.name for field in dataclasses.fields(Switches)]
SETTINGS = {
    "default": Switches(),
    "all": Switches(batched_adaln=True, stored_scores=True),
    "none": Switches.none(),
    **{f"without {name}": Switches(**{name: False}) for name in NAMES if getattr(Switches(), name)},
    **{f"only {name}": dataclasses.replace(Switches.none(), **{name: True}) for name in NAMES},
}
SIZE = {"input_size": 16, "hidden_size": 48, "depth": 4, "num_heads": 2, "num_classes": 10}


def pair(family: str, dtype: torch.dtype = torch.float64, **kwargs: Any) -> tuple[Any, Any]:
    """A reference model with random weights everywhere, and a fast one with copies of them."""
    classes: Any = {"mdtv2": reference.MDTv2, "mdt": reference.MDT, "dit": reference.DiT}
    masks = {} if family == "dit" else {"mask_ratio": 0.3, "decode_layer": 2}
    oracle = classes[family](**SIZE | masks | kwargs).to(dtype).eval()
    for parameter in oracle.parameters():
        nn.init.normal_(parameter, std=0.05)
    fast = type(from_reference(oracle))(**oracle.config.kwargs()).to(dtype).eval()
    fast.load_state_dict(oracle.state_dict())
    return oracle, fast


def batch(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    x_full, x_masked = torch.randn(2, 3, 4, 16, 16, dtype=dtype)
    return {
        "x_full": x_full,
        "x_masked": x_masked,
        "t": torch.tensor([0, 500, 999]),
        "y": torch.tensor([1, 9, 10]),
        "y_masked": torch.tensor([1, 10, 10]),
    }


def two_passes(oracle: nn.Module, b: dict[str, Tensor], plan: MaskPlan) -> tuple[Tensor, Tensor]:
    full = oracle(b["x_full"], b["t"], b["y"])
    return full, oracle(b["x_masked"], b["t"], b["y_masked"], mask_plan=plan)


def gradients(outputs: tuple[Tensor, Tensor], model: nn.Module, weights: list[Tensor]) -> list[Tensor]:
    loss = sum(
        (o.float() * w).sum() if o.dtype != w.dtype else (o * w).sum() for o, w in zip(outputs, weights)
    )
    trained = [p for p in model.parameters() if p.requires_grad]
    return list(torch.autograd.grad(loss, trained, allow_unused=True, materialize_grads=True))


def agree(oracle: Any, fast: Any, b: dict[str, Tensor], plan: MaskPlan, tolerance: float) -> None:
    expected, actual = two_passes(oracle, b, plan), fast.training_step_outputs(**b, mask_plan=plan)
    for a, e in zip(actual, expected, strict=True):
        assert relative_error(a, e) < tolerance
    weights = [torch.randn_like(e) for e in expected]
    found = gradients(actual, fast, weights), gradients(expected, oracle, weights)
    names = [name for name, p in fast.named_parameters() if p.requires_grad]
    for name, a, e in zip(names, *found, strict=True):
        if name.endswith("qkv.bias"):  # without key biases: their exact gradient is zero
            a, e = (torch.cat([g[: len(g) // 3], g[-len(g) // 3 :]]) for g in (a, e))
        assert relative_error(a, e) < tolerance, name


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("family", ["mdtv2", "mdt"])
def test_every_switch_in_float64(family: str, setting: str) -> None:
    torch.manual_seed(0)
    oracle, fast = pair(family)
    fast.set_switches(SETTINGS[setting])
    agree(oracle, fast, batch(), MaskPlan.from_noise(torch.rand(3, 64), 37), FLOAT64)


@pytest.mark.parametrize("len_keep", [0, 1, 37, 64])
@pytest.mark.parametrize(
    ("family", "dtype"), list(itertools.product(["mdtv2", "mdt"], [torch.float64, torch.float32]))
)
def test_every_length(family: str, dtype: torch.dtype, len_keep: int) -> None:
    torch.manual_seed(1)
    oracle, fast = pair(family, dtype, hidden_size=144)  # heads of 72
    tolerance = FLOAT64 if dtype == torch.float64 else 2 * FLOAT32
    agree(oracle, fast, batch(dtype), MaskPlan.from_noise(torch.rand(3, 64), len_keep), tolerance)


@pytest.mark.parametrize("setting", ["default", "all", "none"])
@pytest.mark.parametrize("family", ["mdtv2", "mdt", "dit"])
def test_a_single_pass(family: str, setting: str) -> None:
    torch.manual_seed(2)
    oracle, fast = pair(family)
    fast.set_switches(SETTINGS[setting])
    b = batch()
    plans = [{}] if family == "dit" else [{}, {"mask_plan": MaskPlan.from_noise(torch.rand(3, 64), 37)}]
    for plan in plans:
        expected, actual = (m(b["x_full"], b["t"], b["y"], **plan) for m in (oracle, fast))
        assert relative_error(actual, expected) < FLOAT64


@pytest.mark.parametrize("mode", ["selective", "full"])
@pytest.mark.parametrize("family", ["mdtv2", "mdt"])
def test_checkpointing_changes_no_bit(family: str, mode: str) -> None:
    torch.manual_seed(3)
    _, fast = pair(family, torch.float32)
    b, plan = batch(torch.float32), MaskPlan.from_noise(torch.rand(3, 64), 37)
    weights = [torch.randn(3, 8, 16, 16)] * 2
    expected = gradients(fast.training_step_outputs(**b, mask_plan=plan), fast, weights)
    fast.set_checkpointing(mode)
    actual = gradients(fast.training_step_outputs(**b, mask_plan=plan), fast, weights)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


@pytest.mark.parametrize("packed", [True, False])
def test_draws_are_those_of_two_passes(packed: bool) -> None:
    oracle, fast = pair("mdtv2", torch.float32, class_dropout_prob=0.5)
    fast.set_switches(Switches(packed=packed))
    oracle.train()
    fast.train()
    b = batch(torch.float32)
    torch.manual_seed(4)
    expected = oracle(b["x_full"], b["t"], b["y"]), oracle(b["x_masked"], b["t"], b["y"], enable_mask=True)
    torch.manual_seed(4)
    actual = fast.training_step_outputs(b["x_full"], b["x_masked"], b["t"], b["y"])
    for a, e in zip(actual, expected, strict=True):
        assert relative_error(a, e) < FLOAT32


def test_bfloat16_autocast_and_weights() -> None:
    torch.manual_seed(5)
    oracle, fast = pair("mdtv2", torch.float32)
    b, plan = batch(torch.float32), MaskPlan.from_noise(torch.rand(3, 64), 37)
    expected = two_passes(oracle, b, plan)
    with torch.autocast("cpu", torch.bfloat16):
        plain, actual = two_passes(oracle, b, plan), fast.training_step_outputs(**b, mask_plan=plan)
    for a, p, e in zip(actual, plain, expected, strict=True):
        assert relative_error(a, e) <= 2 * relative_error(p, e)
    for half in (torch.bfloat16, torch.float16):
        low = {name: x.to(half) if x.is_floating_point() else x for name, x in b.items()}
        plain, actual = (
            two_passes(oracle.to(half), low, plan),
            fast.to(half).training_step_outputs(**low, mask_plan=plan),
        )
        for a, p, e in zip(actual, plain, expected, strict=True):
            assert a.dtype == half
            assert relative_error(a, e) <= 2 * max(relative_error(p, e), torch.finfo(half).eps)


def test_refusals() -> None:
    _, fast = pair("mdtv2", torch.float32)
    b = batch(torch.float32)
    with pytest.raises(UserError, match="mask_plan: is for 3 samples of 16 tokens, the input has 3 of 64"):
        fast.training_step_outputs(**b, mask_plan=MaskPlan.from_noise(torch.rand(3, 16), 4))
    with pytest.raises(UserError, match=r"^x_masked: shape \[3, 4, 8, 8\]"):
        fast.training_step_outputs(**b | {"x_masked": b["x_masked"][:, :, :8, :8]})
    with pytest.raises(UserError, match="switches: got dict, expected a Switches"):
        fast.set_switches({"packed": False})
    with pytest.raises(UserError, match="checkpointing: got 'half', expected none, selective, full"):
        fast.set_checkpointing("half")
    fast.set_attention_backend("xformers")
    with pytest.raises(UserError, match="packed does not go with attention_backend 'xformers'"):
        fast.training_step_outputs(**b)
    unmasked = models.MDTv2(**SIZE, decode_layer=2)
    with pytest.raises(UserError, match="mask_plan: needed, as the model's mask_ratio is None"):
        unmasked.training_step_outputs(b["x_full"], b["x_masked"], b["t"], b["y"])


def test_layers_with_hooks_or_in_their_place_run_themselves() -> None:
    """Adapters and float8 layers replace a linear layer by class: their own forward must run."""

    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    torch.manual_seed(6)
    oracle, fast = pair("mdtv2")
    for model in (oracle, fast):
        for block in model.modules():
            for name, layer in list(block.named_children()):
                if (
                    type(layer) is nn.Linear
                    and "adaLN" not in name
                    and type(block).__name__ in ("Attention", "Mlp", "Block")
                ):
                    layer.__class__ = Doubled
    agree(oracle, fast, batch(), MaskPlan.from_noise(torch.rand(3, 64), 37), FLOAT64)
    fast.en_inblocks[0].adaLN_modulation[1].__class__ = Doubled
    fast.set_switches(Switches(batched_adaln=True))
    with pytest.raises(UserError, match="batched_adaln needs plain linear layers"):
        fast.training_step_outputs(**batch())


@pytest.mark.slow
def test_two_hundred_steps_follow_the_reference() -> None:
    """With the same seeds and draws, every loss is within 1e-4 of the reference's (seen: 1e-6)."""
    oracle, fast = pair("mdtv2", torch.float32, hidden_size=32, depth=3, decode_layer=1)
    data = torch.randn(64, 4, 16, 16, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    curves = []
    for model in (oracle, fast):
        model.train()
        diffusion, optimizer = create_diffusion(), torch.optim.AdamW(model.parameters(), lr=1e-3)
        curve = []
        for step in range(200):
            torch.manual_seed(step)
            x, y = data[torch.randint(64, (4,))], torch.randint(10, (4,))
            loss = total_loss(two_pass_losses(model, diffusion, x, torch.randint(1000, (4,)), y))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            curve.append(loss.item())
        curves.append(torch.tensor(curve))
    reference_curve, fast_curve = curves
    off = ((fast_curve - reference_curve) / reference_curve).abs()
    print(f"off by {off.max():.1e} at most, {off.mean():.1e} on average")
    assert reference_curve[-20:].mean() < 0.9 * reference_curve[:20].mean()
    assert off.max() < 1e-4
