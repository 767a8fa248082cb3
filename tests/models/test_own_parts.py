"""Users' hooks, subclasses and modules in a model take effect, whatever is fused."""

import copy
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mdt_fast import DiffusionConfig, DiT, MDTv2, SampleConfig, create_diffusion, sample, write_weights
from mdt_fast.config import SampleSwitches, Switches
from mdt_fast.errors import UserError
from mdt_fast.models import Transformer
from mdt_fast.reference import MDTv2 as ReferenceMDTv2
from tolerances import FLOAT32, relative_error

SHAPE: dict[str, Any] = {
    "input_size": 8, "in_channels": 3, "hidden_size": 32, "depth": 4, "num_heads": 4, "num_classes": 10,
}  # fmt: skip
OF_MDT: dict[str, Any] = {"decode_layer": 2, "mask_ratio": 0.3}
Change = Callable[[nn.Module], Any]


def made(cls: type[nn.Module] = MDTv2) -> Any:
    torch.manual_seed(0)
    model = cls(**SHAPE, **({} if issubclass(cls, DiT) else OF_MDT)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def inputs(batch: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, 3, 8, 8, generator=generator)
    return x, torch.arange(batch) * 200, torch.arange(batch) % 10


def passes(model: nn.Module) -> list[Tensor]:
    """A pass over all tokens, and one over those that a mask keeps."""
    torch.manual_seed(2)
    return [model(*inputs()), model(*inputs(), enable_mask=True)]


class Adapted(nn.Module):
    """A layer with something beside it, like an adapter; it exposes the layer's parameters as its own."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * 1.5

    @property
    def weight(self) -> Tensor:
        return self.layer.weight

    @property
    def bias(self) -> Tensor:
        return self.layer.bias


class Doubled(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def double_patches(model: Any) -> None:
    layer = Doubled(3, 32, 2, 2)
    layer.load_state_dict(model.x_embedder.proj.state_dict())
    model.x_embedder.proj = layer


def without_biases(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.bias = None


def hooked(name: str) -> Change:
    def change(model: nn.Module) -> None:
        model.get_submodule(name).register_forward_hook(lambda module, given, out: out * 1.5)

    return change


def adapted(name: str) -> Change:
    def change(model: nn.Module) -> None:
        owner, _, last = name.rpartition(".")
        setattr(model.get_submodule(owner), last, Adapted(model.get_submodule(name)))

    return change


CHANGES: dict[str, Change] = {
    **{
        f"hook on {name}": hooked(name)
        for name in (
            "x_embedder.proj", "de_blocks.0.adaLN_modulation", "en_inblocks.0.adaLN_modulation.0",
            "final_layer.adaLN_modulation", "final_layer.adaLN_modulation.1", "sideblocks.0.attn",
            "sideblocks.0.attn.qkv", "sideblocks.0", "de_blocks.0.skip_linear", "en_outblocks.0.mlp",
        )
    },
    **{
        f"adapter at {name}": adapted(name)
        for name in ("x_embedder.proj", "de_blocks.1.adaLN_modulation.1", "sideblocks.0.attn.qkv")
    },
    "a convolution of one's own": double_patches,
    "another activation": lambda model: model.de_blocks[0].adaLN_modulation.__setitem__(0, nn.Tanh()),
    "one more layer": lambda model: model.de_blocks[0].adaLN_modulation.append(nn.Tanh()),
    "no biases": without_biases,
    "spectral norm": lambda model: nn.utils.parametrizations.spectral_norm(model.x_embedder.proj).eval(),
    "weight norm, classic": lambda model: nn.utils.weight_norm(model.x_embedder.proj),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("change", CHANGES)
def test_changed_alike_it_is_the_reference(change: str) -> None:
    ours, theirs = made(), made(ReferenceMDTv2)
    before = passes(ours)
    for model in (ours, theirs):
        torch.manual_seed(3)  # some of them draw
        CHANGES[change](model)
    found, expected = passes(ours), passes(theirs)
    assert max(relative_error(a, b) for a, b in zip(found, expected, strict=True)) <= 2 * FLOAT32
    norm_alone = "norm" in change and "spectral" not in change  # changes only how a weight is stored
    assert norm_alone or not all(torch.equal(a, b) for a, b in zip(found, before, strict=True))


def test_a_layer_is_run_once_in_a_masked_pass() -> None:
    model, seen = made(), []
    qkv = model.sideblocks[0].attn.qkv
    qkv.register_forward_hook(lambda module, given, out: seen.append(tuple(out.shape)))
    model(*inputs(), enable_mask=True)
    assert seen == [(4, 16, 96)]


def test_what_stands_on_the_embedder_does_not_depend_on_the_batch() -> None:
    model = made()
    model.x_embedder.register_forward_hook(lambda module, given, out: out * 2)
    x, t, y = inputs()
    alone = [model(x[i : i + 1], t[i : i + 1], y[i : i + 1]) for i in range(4)]
    assert relative_error(model(x, t, y), torch.cat(alone)) <= FLOAT32


def test_names_of_a_modulations_parts_do_not_matter() -> None:
    model, other = made(), made()
    for block in model.every_block():
        activation, layer = block.adaLN_modulation
        block.adaLN_modulation = nn.Sequential(OrderedDict(act=activation, lin=layer))
    assert all(torch.equal(a, b) for a, b in zip(passes(model), passes(other), strict=True))
    model.set_switches(Switches(batched_adaln=True))
    assert relative_error(model(*inputs()), other(*inputs())) <= FLOAT32
    model.de_blocks[0].adaLN_modulation = Adapted(model.de_blocks[0].adaLN_modulation)
    with pytest.raises(UserError, match="switches: batched_adaln needs plain linear layers"):
        model(*inputs())


class Forwarded(nn.Module):
    def __init__(self, inside: nn.Module):
        super().__init__()
        self.inside = inside

    def forward(self, *args: Any) -> Tensor:
        result: Tensor = self.inside(*args)
        return result


def test_a_module_in_the_last_layers_place_is_sampled_with() -> None:
    model, config = made(), SampleConfig(steps=3)
    before = sample(model, DiffusionConfig(), [1, 2], config, clip_denoised=False)
    model.final_layer = Forwarded(model.final_layer)
    after = sample(model, DiffusionConfig(), [1, 2], config, clip_denoised=False)
    assert relative_error(after, before) <= 10 * FLOAT32


class ZeroDiT(DiT):
    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return 0 * super().forward(*args, **kwargs)


class ZeroMDT(MDTv2):
    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return 0 * super().forward(*args, **kwargs)


class Silent:
    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return torch.zeros(1)


class MixedMDT(Silent, MDTv2):
    pass


def test_a_subclass_has_its_own_forward_in_sampling_and_training() -> None:
    config, diffusion = SampleConfig(steps=3), create_diffusion("ddim3", learn_sigma=True)
    drawn = sample(made(ZeroDiT), DiffusionConfig(), [1, 2], config, clip_denoised=False)
    start = sample(made(DiT), DiffusionConfig(), [1, 2], config, clip_denoised=False)
    assert not torch.equal(drawn, start)
    plain = type("Plain", (MDTv2,), {})  # with nothing of its own: the same results
    assert torch.equal(passes(made(plain))[0], passes(made())[0])
    x, _, y = inputs()
    with pytest.raises(UserError, match=r"model: ZeroMDT has a forward of its own, without"):
        diffusion.two_pass_losses(made(ZeroMDT), x, torch.zeros(4).long(), y)
    with pytest.raises(UserError, match=r"model: MixedMDT has a forward of its own"):
        diffusion.two_pass_losses(made(MixedMDT), x, torch.zeros(4).long(), y)
    assert diffusion.two_pass_losses(made(plain), x, torch.zeros(4).long(), y)["loss"].shape == (4,)


@pytest.mark.parametrize("change", ["hook on de_blocks.0.adaLN_modulation", "another activation"])
def test_modulations_of_ones_own_are_in_the_pictures(change: str) -> None:
    model, config = made(), SampleConfig(steps=3)
    before = sample(model, DiffusionConfig(), [1, 2], config, clip_denoised=False)
    CHANGES[change](model)
    drawn, plainly = (
        sample(model, DiffusionConfig(), [1, 2], config, clip_denoised=False, switches=switches)
        for switches in (SampleSwitches(), SampleSwitches.none())
    )
    assert relative_error(drawn, plainly) <= 10 * FLOAT32
    assert relative_error(drawn, before) > 1e-3


def test_wrapped_models_are_named() -> None:
    for wrapper, advice in (
        (
            torch.optim.swa_utils.AveragedModel(made()),
            "AveragedModel has no config; pass the model it wraps, its .mod",
        ),
        (nn.Linear(2, 2), "Linear has no config; this package's models have one"),
    ):
        with pytest.raises(UserError, match=advice):
            sample(wrapper, DiffusionConfig(), [1], SampleConfig(steps=2))


@pytest.mark.parametrize("cls", [DiT, MDTv2])
def test_second_derivatives_are_refused_whatever_is_asked_for(cls: type[Transformer]) -> None:
    """Also if autograd is asked for some gradients only, and would silently leave out terms."""
    model, (x, t, y) = made(cls), inputs()
    parameters = [p for p in model.parameters() if p.requires_grad]
    z = x.clone().requires_grad_()
    loss = model(z, t, y).square().mean()
    (slope,) = torch.autograd.grad(loss, z, create_graph=True)
    penalty = loss + slope.square().sum()
    functional = torch.autograd.functional
    for ask in (
        lambda: torch.autograd.grad(penalty, parameters, retain_graph=True, allow_unused=True),
        lambda: penalty.backward(inputs=parameters, retain_graph=True),
        lambda: penalty.backward(retain_graph=True),
        lambda: functional.hvp(lambda x: model(x, t, y).square().sum(), x, torch.ones_like(x)),
        lambda: functional.jvp(lambda x: model(x, t, y).square().sum(), x, torch.ones_like(x)),
    ):
        with pytest.raises(RuntimeError, match="there is no second derivative"):
            ask()
    assert torch.equal(torch.autograd.grad(loss, z, retain_graph=True)[0], slope)


@pytest.mark.parametrize("checkpointing", ["selective", "full"])
def test_a_first_derivative_that_may_be_differentiated_goes_with_checkpointing(checkpointing: str) -> None:
    slopes = []
    for mode in ("none", checkpointing):
        model, (x, t, y) = made(), inputs()
        model.set_checkpointing(mode)
        z = x.clone().requires_grad_()
        slopes.append(torch.autograd.grad(model(z, t, y).sum(), z, create_graph=True)[0])
    assert relative_error(slopes[1].detach(), slopes[0].detach()) <= FLOAT32
    with pytest.raises(RuntimeError, match="there is no second derivative"):
        slopes[1].square().sum().backward()


def test_an_ensemble_by_vmap_has_each_models_gradients() -> None:
    models, (x, t, y) = [made(), made()], inputs()
    for parameter in models[1].parameters():
        parameter.data.mul_(1.1)
    stacked, buffers = torch.func.stack_module_state(models)
    base = made()

    def outputs(parameters: Any, buffers: Any, x: Tensor) -> Tensor:
        result: Tensor = torch.func.functional_call(base, (parameters, buffers), (x, t, y))
        return result

    found = torch.func.vmap(outputs, (0, 0, None))(stacked, buffers, x)
    found.square().sum().backward()
    for i, model in enumerate(models):
        expected = model(x, t, y)
        expected.square().sum().backward()
        assert relative_error(found[i], expected) <= FLOAT32
        for name, parameter in model.named_parameters():
            if (
                parameter.grad is not None and "attn.qkv.bias" not in name
            ):  # keys' gradients are only rounding
                assert relative_error(stacked[name].grad[i], parameter.grad) <= 10 * FLOAT32, name


class OfWide(MDTv2):
    """With another MLP in its blocks."""

    def blocks_of(self, number: int, skip: bool = False) -> nn.ModuleList:
        blocks = super().blocks_of(number, skip)
        for block in blocks:
            block.mlp = nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 32))
        return blocks


class OfMore(MDTv2):
    def __init__(self, more: int, **kwargs: Any):
        super().__init__(**kwargs)


def test_a_model_with_parts_of_its_own(tmp_path: Path) -> None:
    class Mine(MDTv2):
        pass

    model = made()
    model.save_pretrained(tmp_path / "plain")
    assert type(Mine.from_pretrained(tmp_path / "plain")) is Mine
    assert type(Transformer.from_pretrained(tmp_path / "plain")) is MDTv2
    larger = OfWide(**SHAPE, **OF_MDT)
    larger.save_pretrained(tmp_path / "wide")
    assert all(
        torch.equal(*pair)
        for pair in zip(
            OfWide.from_pretrained(tmp_path / "wide").parameters(), larger.parameters(), strict=True
        )
    )
    with pytest.raises(UserError, match=r"from_pretrained: OfMore takes other arguments: .*required"):
        OfMore.from_pretrained(tmp_path / "wide")
    model.de_blocks[0].attn.qkv = nn.Sequential(model.de_blocks[0].attn.qkv)
    with pytest.raises(
        UserError, match=r"^save_pretrained: got additional parts \(de_blocks.0.attn.qkv.0.bias,"
    ):
        model.save_pretrained(tmp_path / "own")
    assert not (tmp_path / "own").exists()


def test_what_is_no_folder_of_a_model(tmp_path: Path) -> None:
    file = tmp_path / "weights.safetensors"
    write_weights(file, made().state_dict())
    with pytest.raises(UserError, match=r"expected a folder; load_weights\(model, read_weights"):
        MDTv2.from_pretrained(file)
    (tmp_path / "config.json").write_text('{"model": {}, "train": {}}')
    with pytest.raises(UserError, match=r"a file that save_pretrained wrote is needed; it is a run's"):
        MDTv2.from_pretrained(tmp_path)


def test_a_copied_block_has_its_own_modulation() -> None:
    """Models made deeper by a copied block: in sampling, and where all modulations are one product."""
    model = made(DiT)
    deeper = copy.deepcopy(model.blocks[-1])
    with torch.no_grad():
        for parameter in deeper.adaLN_modulation.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    model.blocks.append(deeper)
    config = SampleConfig(steps=3, sampler="ddpm", cfg_scale=2.0)
    plain, fast = (
        sample(model, DiffusionConfig(), [1, 2], config, clip_denoised=False, switches=switches)
        for switches in (SampleSwitches.none(), SampleSwitches())
    )
    assert relative_error(fast, plain) <= 10 * FLOAT32
    expected = model(*inputs())
    model.set_switches(Switches(batched_adaln=True))
    assert relative_error(model(*inputs()), expected) <= FLOAT32
