"""What users put into a model or beside its parts is in the pictures, whichever switches are on."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mdt_fast import DiffusionConfig, DiT, MDTv2, SampleConfig, sample
from mdt_fast.config import SampleSwitches
from mdt_fast.errors import UserError
from mdt_fast.models.blocks import Block, FinalLayer
from mdt_fast.models.sampling import conditions_plainly
from mdt_fast.sampling import Sampler, export_step
from mdt_fast.sampling.generate import respaced
from mdt_fast.sampling.guided import GuidedModel
from small_models import made
from tolerances import FLOAT64, relative_error

CONFIG = SampleConfig(steps=4, batch_size=3, cfg_scale=3.8, scale_pow=None)
LABELS = [3, 1, 3, 5]


def draw(model: nn.Module, switches: SampleSwitches) -> Tensor:
    return sample(model, DiffusionConfig(), LABELS, CONFIG, switches=switches)


def fast_and_plain(model: nn.Module) -> tuple[Tensor, Tensor]:
    return draw(model, SampleSwitches()), draw(model, SampleSwitches.none())


ATTACHED: dict[str, Callable[[Any], nn.Module]] = {
    "a last layer": lambda model: FinalLayer(32, 2, 8),
    "a copy": copy.deepcopy,
    "a wider model": lambda model: MDTv2(input_size=8, hidden_size=64, depth=2, num_heads=2, decode_layer=0),
    "a narrower block": lambda model: Block(16, 2, 4.0, None),
    "a list of other modules": lambda model: nn.ModuleList([nn.Linear(4, 4)]),
}


@pytest.mark.parametrize("attached", ATTACHED)
def test_what_is_attached_to_a_model_is_not_part_of_its_steps(attached: str) -> None:
    model = made("mdtv2").eval()
    before = draw(model, SampleSwitches())
    model.attached = ATTACHED[attached](model).double()
    fast, plain = fast_and_plain(model)
    assert torch.equal(fast, before)
    assert relative_error(plain, before) <= FLOAT64
    assert conditions_plainly(model)


class Conditioned(Block):
    """A block that also uses the conditioning itself."""

    def forward(self, x: Tensor, c: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return super().forward(x, c, *args, **kwargs) + c[:, None]


class ByItself(nn.Module):
    """A module in a block's place."""

    def forward(self, x: Tensor, c: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return x + c[:, None]


class Mine(DiT):
    def run(self, block: Any, x: Tensor, c: Any, *args: Any, **kwargs: Any) -> Tensor:
        return super().run(block, x + c.plain[:, None], c, *args, **kwargs)


def of_class(cls: type[nn.Module]) -> Callable[[Any], None]:
    return lambda model: setattr(model.blocks[1], "__class__", cls)


def replaced(model: Any) -> None:
    model.blocks[1] = ByItself()


def conditioned(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return output + args[1][:, None]


def by_row(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    """Something else in each row of the batch."""
    row = torch.arange(len(output)).view(-1, *[1] * (output.ndim - 1))
    return output + row * torch.linspace(-1, 1, output.shape[-1])


def hooked(name: str, hook: Callable[..., Tensor]) -> Callable[[Any], None]:
    return lambda model: model.get_submodule(name).register_forward_hook(hook)


OWN: dict[str, Callable[[Any], Any]] = {
    "a block's class": of_class(Conditioned),
    "a block's place": replaced,
    "the model's class": lambda model: setattr(model, "__class__", Mine),
    "a hook on a block": hooked("blocks.1", conditioned),
    "a hook on the last layer": hooked("final_layer", conditioned),
    **{
        f"a hook on {name}": hooked(name, by_row)
        for name in (
            "t_embedder", "y_embedder", "y_embedder.embedding_table", "t_embedder.mlp.2", "x_embedder",
            "blocks.0.adaLN_modulation.1", "final_layer.adaLN_modulation.1", "blocks.0.attn",
            "blocks.1.mlp.fc1",
        )
    },
}  # fmt: skip


@pytest.mark.parametrize("own", OWN)
def test_what_sees_the_conditioning_or_the_rows_sees_those_of_a_whole_pass(own: str) -> None:
    model = made("dit").eval()
    before = draw(model, SampleSwitches())
    OWN[own](model)
    fast, plain = fast_and_plain(model)
    assert relative_error(fast, plain) <= FLOAT64
    assert relative_error(plain, before) > 1e-3


def test_a_decoder_of_ones_own_sees_the_conditioning() -> None:
    class Own(MDTv2):
        def decode(self, x: Tensor, c: Any, *args: Any, **kwargs: Any) -> Tensor:
            return super().decode(x + c.plain.mean(1)[:, None, None], c, *args, **kwargs)

    model = made("mdtv2").eval()
    before = draw(model, SampleSwitches())
    model.__class__ = Own
    fast, plain = fast_and_plain(model)
    assert relative_error(fast, plain) <= FLOAT64
    assert relative_error(plain, before) > 1e-3


def test_a_hook_set_between_batches_counts() -> None:
    model = made("dit").eval()
    sampler = Sampler(model, respaced(model, DiffusionConfig(), CONFIG), CONFIG)
    sampler(LABELS)
    for name in ("y_embedder", "x_embedder"):
        hooked(name, by_row)(model)
    plain = sample(
        model, DiffusionConfig(), LABELS, replace(CONFIG, batch_size=4), switches=SampleSwitches.none()
    )
    assert relative_error(sampler(LABELS), plain) <= FLOAT64


class OwnGuidance(MDTv2):
    def forward_with_cfg(self, *args: Any, **kwargs: Any) -> Tensor:
        raise AssertionError("called")


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_a_guidance_of_ones_own_is_not_passed_over(sampler: str, tmp_path: Path) -> None:
    model = OwnGuidance(input_size=8, hidden_size=32, depth=4, num_heads=2, num_classes=10, decode_layer=2)
    config = SampleConfig(steps=2, sampler=sampler, cfg_scale=2.0)
    expected = r"^model: got OwnGuidance with its own forward_with_cfg, .*p_sample_loop.* and cfg_scale=1$"
    with pytest.raises(UserError, match=expected):
        sample(model, DiffusionConfig(), [1], config)
    with pytest.raises(UserError, match=expected):
        export_step(model, DiffusionConfig(), tmp_path / "step.pt2", config)
    assert sample(model, DiffusionConfig(), [1], replace(config, cfg_scale=1)).shape == (1, 4, 8, 8)
    plain = made("mdtv2").eval()
    plain.forward_with_cfg = torch.compile(plain.forward_with_cfg)  # is still this package's
    assert len(sample(plain, DiffusionConfig(), [1], config)) == 1


def test_the_variance_of_a_model_with_more_inputs_is_not_guided() -> None:
    model: Any = MDTv2(
        input_size=8, hidden_size=32, depth=4, num_heads=2, num_classes=10, decode_layer=2, in_channels=8
    )
    model.out_channels, model.final_layer = 8, FinalLayer(32, 2, 8)
    diffusion = respaced(made("mdtv2"), DiffusionConfig(), CONFIG)
    steps = GuidedModel(model, diffusion, CONFIG, False, SampleSwitches())
    assert steps.channels == 3
