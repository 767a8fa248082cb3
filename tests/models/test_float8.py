"""Linear layers in float8, emulated: what is replaced, that weights stay unchanged, that it learns."""

import copy
import importlib.util
from dataclasses import asdict
from functools import partial
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import mdt_fast
from mdt_fast import MDT, DiT, MDTv2, UserError, compile_for_training, kernels, use_float8
from mdt_fast.config import SampleConfig, SampleSwitches, Switches
from mdt_fast.diffusion import create_diffusion
from mdt_fast.kernels.linear import op as linear_op
from mdt_fast.models import flops as flops  # registers the formulas
from mdt_fast.models import sampling
from mdt_fast.models.float8 import check_float8
from mdt_fast.models.ops import Float8Linear
from mdt_fast.training.objective import draw, losses_of, total_loss
from tolerances import FLOAT32, relative_error

By = Literal["kernels", "torchao"]
needs_torchao = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="needs torchao")
BY = pytest.mark.parametrize("by", ["kernels", pytest.param("torchao", marks=needs_torchao)])

SHAPE = {
    "input_size": 8, "patch_size": 2, "in_channels": 1, "hidden_size": 32, "depth": 4, "num_heads": 2,
    "num_classes": 10,
}  # fmt: skip
MASKED = {"mask_ratio": 0.3, "decode_layer": 2}


def model(cls: Any = MDTv2, **shape: int) -> Any:
    """A model whose weights make every layer count."""
    torch.manual_seed(0)
    made = cls(**{**SHAPE, **({} if cls is DiT else MASKED), **shape})
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return made


def in_float8(made: Any, by: By = "kernels") -> Any:
    converted = copy.deepcopy(made)
    use_float8(converted, by, emulate=True)
    return converted


@BY
def test_the_blocks_products_are_replaced_and_nothing_else(by: By) -> None:
    plain, converted = model(), model()
    skips = 3 if by == "torchao" else 0  # side block included; three have a long skip
    assert use_float8(converted, by, emulate=True) == 4 * 5 + skips
    assert use_float8(converted, by, emulate=True) == 0
    assert type(converted.sideblocks[0].mlp.fc1).__name__ == "Float8Linear"
    assert type(converted.sideblocks[0].adaLN_modulation[1]) is torch.nn.Linear
    assert type(converted.final_layer.linear) is torch.nn.Linear
    ours, theirs = converted.state_dict(), plain.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def inputs(batch: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(batch, 1, 8, 8), torch.arange(batch) * 90, torch.arange(batch)


def gradients(trained: Any, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """The objective's loss, and all gradients as one vector."""
    x, _, y = inputs()
    torch.manual_seed(3)
    diffusion = create_diffusion()
    draws = draw(trained, diffusion, len(x), x.device)
    with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
        loss = total_loss(losses_of(trained, diffusion, x, y, draws))
    trained.zero_grad()
    loss.backward()
    return loss.detach(), torch.cat([p.grad.flatten() for p in trained.parameters() if p.grad is not None])


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cls", [MDTv2, MDT, DiT])
def test_a_step_is_near_the_exact_one(cls: Any, dtype: torch.dtype | None) -> None:
    loss, exact = gradients(model(cls))
    rounded_loss, rounded = gradients(in_float8(model(cls)), dtype)
    assert (rounded_loss - loss).abs() < 0.01 * loss
    assert 1e-4 < (rounded - exact).norm() / exact.norm() < 0.08


class Rounded:
    """Records the shapes of the weights that are rounded."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.shapes: list[tuple[int, ...]] = []
        plain = linear_op.quantize_weight_fwd

        def counted(weight: Tensor, columns: bool) -> Any:
            self.shapes.append(tuple(weight.shape))
            return plain(weight, columns)

        monkeypatch.setattr(linear_op, "quantize_weight_fwd", counted)

    def take(self) -> list[tuple[int, ...]]:
        taken, self.shapes = sorted(self.shapes), []
        return taken


BLOCK = [(32, 32), (32, 128), (96, 32), (128, 32)]
ASIDE = [(32, 32), (32, 32), (32, 128), (64, 32), (128, 32)]
"""In the side block only the masked tokens have queries."""
SWITCHES = [
    Switches(),
    *(
        Switches(**{name: False})
        for name in ("fused_adaln", "fused_mlp", "packed", "recompute", "masked_side")
    ),
    Switches(fused_adaln=False, fused_mlp=False),
]


@pytest.mark.parametrize(
    "switches", SWITCHES, ids=lambda s: str([k for k, on in asdict(s).items() if not on])
)
def test_every_way_through_a_block_rounds_alike(switches: Switches, monkeypatch: pytest.MonkeyPatch) -> None:
    """And every layer rounds its weight, in training and in eval mode; packed passes do so once."""
    converted, rounded = in_float8(model()), Rounded(monkeypatch)
    loss, expected = gradients(converted)
    rounded.take()
    converted.set_switches(switches)
    other, found = gradients(converted)
    assert relative_error(other, loss) < 1e-5
    assert (found - expected).norm() < 1e-4 * expected.norm()
    side = ASIDE if switches.masked_side else BLOCK
    assert rounded.take() == sorted(BLOCK * 4 * (1 if switches.packed else 2) + side)
    with torch.no_grad():
        converted.eval()(*inputs())
    assert rounded.take() == sorted(BLOCK * 4)


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_checkpointing_changes_no_bit(mode: str) -> None:
    converted = in_float8(model())
    _, expected = gradients(converted)
    converted.set_checkpointing(mode)
    assert torch.equal(gradients(converted)[1], expected)


def test_hooks_and_adapters_get_the_layers_own_product(monkeypatch: pytest.MonkeyPatch) -> None:
    converted, seen = in_float8(model()).eval(), []
    args, rounded = inputs(), Rounded(monkeypatch)
    with torch.no_grad():
        expected = converted(*args)
        rounded.take()
        for module in converted.modules():
            if type(module) is Float8Linear:
                module.register_forward_hook(lambda layer, given, out: seen.append(layer))
        assert relative_error(converted(*args), expected) < 1e-5
    assert len(seen) == 16
    assert rounded.take() == sorted(BLOCK * 4)


def test_compiled_by_blocks() -> None:
    converted = in_float8(model())
    _, expected = gradients(converted)
    torch._dynamo.reset()
    compile_for_training(converted, backend="aot_eager")
    assert (gradients(converted)[1] - expected).norm() < 1e-4 * expected.norm()


@pytest.mark.parametrize("by", ["ddim", "ddpm"])
def test_sampling(by: Any) -> None:
    """Near each other with all switches and with none, and near the exact model's pictures."""
    plain = model(hidden_size=64).eval()
    converted = in_float8(plain)
    config = SampleConfig(num_samples=3, steps=4, sampler=by, cfg_scale=2.0, dtype="bfloat16")
    draws = partial(mdt_fast.sample, diffusion=mdt_fast.DiffusionConfig(), labels=[1, 2, 3], config=config)
    ours, stepwise = draws(converted), draws(converted, switches=SampleSwitches.none())
    exact = draws(plain)
    assert (ours - stepwise).norm() < 0.03 * exact.norm()
    assert 0 < (ours - exact).norm() < 0.1 * exact.norm()


def losses(trained: MDTv2, steps: int) -> list[float]:
    """The losses of a short training on one batch of stripes."""
    diffusion = create_diffusion(min_snr_gamma=5.0)
    optimizer = torch.optim.AdamW(trained.parameters(), lr=3e-3)
    y = torch.arange(8)
    x = torch.sin(torch.arange(8)[None, None, None] * (y[:, None, None, None] + 1) / 2).expand(8, 1, 8, 8)
    found = []
    for step in range(steps):
        torch.manual_seed(step)
        draws = draw(trained, diffusion, 8, torch.device("cpu"))
        loss = total_loss(losses_of(trained, diffusion, x, y, draws))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


@pytest.mark.slow
@BY
def test_it_learns_as_float32_does(by: By) -> None:
    """80 steps with the same seeds: the last 30 losses are within 3% of float32's on average."""
    shape = {**SHAPE, **MASKED, "depth": 2, "decode_layer": 0}
    torch.manual_seed(0)
    plain = MDTv2(**shape)
    exact, rounded = (torch.tensor(losses(m, 80)) for m in (copy.deepcopy(plain), in_float8(plain, by)))
    assert exact[-30:].mean() < 0.7 * exact[:10].mean()
    assert (rounded[-30:].mean() / exact[-30:].mean() - 1).abs() < 0.03
    assert (rounded != exact).any()


def test_exported_it_is_exact() -> None:
    """An exported program runs without this package, with PyTorch's products."""
    plain = model().eval()
    program = torch.export.export(in_float8(plain), inputs())
    with torch.no_grad():
        assert relative_error(program.module()(*inputs()), plain(*inputs())) < FLOAT32


@BY
def test_refusals(by: By) -> None:
    with pytest.raises(
        UserError,
        match=r"float8: needs a GPU of compute capability 8.9, 9.0, 10.0, 10.3, the model is on cpu",
    ):
        use_float8(model(), by)
    with pytest.raises(
        UserError, match=r"float8: widths have to be multiples of 16; en_inblocks.0.attn.qkv is 24 to 72"
    ):
        use_float8(model(hidden_size=24), by, emulate=True)


def test_every_width_counts() -> None:
    made = model(depth=2, decode_layer=0, mlp_ratio=1.25)
    with pytest.raises(UserError, match=r"multiples of 16; en_inblocks.0.mlp.fc1 is 32 to 40"):
        use_float8(made, emulate=True)
    with pytest.raises(UserError, match=r"float8: widths have to be multiples of 16; the model has 40"):
        check_float8(torch.device("cpu"), made.config)


@needs_torchao
def test_one_way_at_a_time() -> None:
    for first, second in (("kernels", "torchao"), ("torchao", "kernels")):
        made = in_float8(model(), first)
        with pytest.raises(
            UserError, match=f"by: got {second!r}, but the model has layers in float8 by {first!r}"
        ):
            use_float8(made, second, emulate=True)


@needs_torchao
@pytest.mark.filterwarnings("ignore")
def test_with_weights_of_other_tensors() -> None:
    """Weights that torchao has quantised are refused; afterwards, torchao may replace the layers."""
    quantization = pytest.importorskip("torchao.quantization")

    def quantized(made: Any) -> Any:
        quantization.quantize_(
            made,
            quantization.Int8WeightOnlyConfig(),
            filter_fn=lambda m, name: "attn" in name and hasattr(m, "weight"),
        )
        return made

    with pytest.raises(UserError, match=r"float8: the weight of en_inblocks.0.attn.qkv is a \w+ already"):
        use_float8(quantized(model().eval()), emulate=True)
    ours, plain = quantized(in_float8(model().eval())), model().eval()
    with torch.no_grad():
        assert relative_error(ours(*inputs()), plain(*inputs())) < 0.1


def test_wrong_arguments() -> None:
    with pytest.raises(UserError, match=r"by: got \['kernels'\], expected"):
        use_float8(model(), ["kernels"], emulate=True)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="by: got 'apex', expected 'kernels' or 'torchao'"):
        use_float8(model(), "apex", emulate=True)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="model: got a Linear, expected this package's models"):
        use_float8(torch.nn.Linear(16, 16), emulate=True)  # type: ignore[arg-type]


def test_flops_are_those_of_exact_products() -> None:
    counted = []
    for made in (model(), in_float8(model())):
        with FlopCounterMode(display=False) as counter:
            gradients(made)
        counted.append(counter.get_total_flops())
    assert counted[0] == counted[1] > 0


def test_a_sampler_rounds_the_weights_once_for_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the weights as they are then; behind the batch, no layer holds a rounded copy."""
    rounded: list[int] = []
    for module, name in ((linear_op, "quantize_weight_fwd"), (sampling, "quantize_weight")):
        plain = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, _p=plain, **k: rounded.append(len(a[0])) or _p(*a, **k))
    converted = in_float8(model(DiT)).eval()
    config = SampleConfig(steps=3, sampler="ddim", cfg_scale=2.0, dtype="bfloat16")
    pictures = [mdt_fast.sample(converted, mdt_fast.DiffusionConfig(), [1, 2], config)]
    assert len(rounded) == 4 * 4
    assert all(layer.rounded is None for layer in converted.modules() if type(layer) is Float8Linear)
    with torch.no_grad():
        converted.blocks[0].mlp.fc1.weight.mul_(3)
    pictures.append(mdt_fast.sample(converted, mdt_fast.DiffusionConfig(), [1, 2], config))
    once = SampleSwitches(cast_once=False)
    again = mdt_fast.sample(converted, mdt_fast.DiffusionConfig(), [1, 2], config, switches=once)
    assert torch.equal(pictures[1], again)
    assert not torch.equal(*pictures)
    assert len(rounded) == 4 * 4 * (2 + 3)


def test_a_sampler_may_be_watched() -> None:
    """A mode that looks at operators has everything run as autograd functions, whose contexts do not know
    that gradients are off."""
    converted = in_float8(model(DiT)).eval()
    config = SampleConfig(steps=2, sampler="ddim", cfg_scale=2.0, dtype="bfloat16")
    plain = mdt_fast.sample(converted, mdt_fast.DiffusionConfig(), [1, 2], config)
    with FlopCounterMode(display=False):
        assert torch.equal(mdt_fast.sample(converted, mdt_fast.DiffusionConfig(), [1, 2], config), plain)


def test_a_rounded_weight_is_for_passes_without_gradients() -> None:
    x, weight = torch.randn(5, 32), torch.randn(16, 32, requires_grad=True)
    rows, _, scale = kernels.quantize_weight(weight)
    with torch.no_grad():
        ours = kernels.linear(x, weight, float8=(rows, scale))
        assert torch.equal(ours, kernels.linear(x, weight, float8=True))
    with pytest.raises(ValueError, match="float8: a weight that is rounded already is for passes without"):
        kernels.linear(x, weight, float8=(rows, scale))
    with (
        torch.no_grad(),
        pytest.raises(ValueError, match=r"float8's rows: shape \[15, 32\], expected \[16, 32\]"),
    ):
        kernels.linear(x, weight, float8=(rows[:15], scale))
