"""GELU as the epilogue of the product before it, when no gradients are needed."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import mdt_fast.kernels.linear.flops  # noqa: F401 (formulas)
from mdt_fast import MaskPlan, Switches
from mdt_fast.config import ModelConfig
from mdt_fast.kernels.linear import onednn, op
from mdt_fast.models import blocks
from mdt_fast.models.zoo import build_model
from tolerances import FLOAT32, relative_error

SHAPE = {"input_size": 8, "patch_size": 2, "in_channels": 4, "hidden_size": 32, "depth": 4, "num_heads": 2}


def made(family: str, **switches: bool) -> Any:
    torch.manual_seed(0)
    mask = {"mask_ratio": None, "decode_layer": 0} if family == "dit" else {"decode_layer": 2}
    model = build_model(ModelConfig(**SHAPE, family=family, num_classes=3, **mask))  # type: ignore[arg-type]
    for parameter in model.parameters():
        if not parameter.any():
            parameter.data.normal_(std=0.1)
    model.set_switches(Switches(**switches))
    return model.eval()


@pytest.fixture
def epilogues(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes that it is asked for; every CPU claims to have it here."""
    asked: list[tuple[int, ...]] = []
    monkeypatch.setattr(blocks, "gelu_epilogue", lambda *_: True)
    from mdt_fast.kernels.ln_modulate import linear

    def product_gelu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        asked.append(tuple(x.shape))
        return op.product_gelu(x, weight, bias)

    monkeypatch.setattr(linear, "product_gelu", product_gelu)
    return asked


@pytest.mark.parametrize("family", ["mdtv2", "mdt", "dit"])
@pytest.mark.parametrize("fused_adaln", [True, False])
@pytest.mark.parametrize("masked", [False, True])
def test_the_same_outputs(
    family: str, fused_adaln: bool, masked: bool, epilogues: list[tuple[int, ...]]
) -> None:
    model = made(family, fused_adaln=fused_adaln)
    x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([3, 700]), torch.tensor([0, 2])
    more: dict[str, Any] = {}
    if masked and family != "dit":
        more = {"enable_mask": True, "mask_plan": MaskPlan.from_noise(torch.rand(2, 16), 9, ascending=True)}
    expected = model(x, t, y, **more)
    assert not epilogues  # gradients are needed
    with torch.no_grad():
        ours = model(x, t, y, **more)
    assert relative_error(ours, expected.detach()) <= FLOAT32
    in_use = len(list(model.every_block())) - (0 if more or family == "dit" else 1)  # no masks: no side block
    assert len(epilogues) == (in_use if fused_adaln else 0)


REPLACED: dict[str, Callable[[Any, list[Tensor]], Any]] = {
    "hook": lambda mlp, seen: mlp.register_forward_pre_hook(lambda _, args: seen.append(*args)),
    "forward": lambda mlp, seen: setattr(
        mlp, "forward", lambda x, plain=mlp.forward: seen.append(x) or plain(x)
    ),
}


@pytest.mark.parametrize("how", REPLACED)
def test_what_looks_at_the_mlp_sees_what_it_always_saw(how: str, epilogues: list[tuple[int, ...]]) -> None:
    model = made("dit")
    mlp, seen = next(iter(model.every_block())).mlp, []
    x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([3, 700]), torch.tensor([0, 2])
    REPLACED[how](mlp, seen)
    expected = model(x, t, y)
    with torch.no_grad():
        ours = model(x, t, y)
    assert relative_error(ours, expected.detach()) <= FLOAT32
    assert relative_error(seen[1], seen[0].detach()) <= FLOAT32
    assert len(epilogues) == SHAPE["depth"] - 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("where", ["autocast", "weights"])
def test_in_every_dtype(dtype: torch.dtype, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU itself says whether it has one; for small products, too."""
    monkeypatch.setattr(onednn, "MIN_FLOPS", 0)
    model = made("mdtv2")
    x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([3, 700]), torch.tensor([0, 2])
    expected = model(x, t, y).detach()
    if where == "weights":
        model, x = model.to(dtype), x.to(dtype)
    cast = torch.autocast("cpu", dtype, enabled=where == "autocast" and dtype != torch.float32)
    with torch.no_grad(), cast:
        assert relative_error(model(x, t, y), expected) <= (FLOAT32 if dtype == torch.float32 else 3e-2)


@pytest.mark.parametrize("ours", [True, False], ids=["oneDNN", "cuBLASLt"])
def test_its_flops_are_counted(ours: bool) -> None:
    x, weight, bias = torch.randn(5, 8), torch.randn(12, 8), torch.randn(12)
    with FlopCounterMode(display=False) as counter:
        if ours:
            op.product_gelu(x, weight, bias)
        else:
            torch._addmm_activation(bias, x, weight.t(), use_gelu=True)
    assert counter.get_total_flops() == 2 * 5 * 8 * 12
