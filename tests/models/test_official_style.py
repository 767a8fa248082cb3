"""Code and parts written for the official models work here as they do there, or are refused."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mdt_fast import MDT, DiffusionConfig, DiT, MDTv2, SampleConfig, SampleSwitches, reference, sample
from mdt_fast.errors import UserError
from mdt_fast.models.blocks import unpatchify
from mdt_fast.reference import layers
from tolerances import FLOAT64, relative_error

SHAPE: dict[str, Any] = {
    "input_size": 8, "hidden_size": 32, "depth": 4, "num_heads": 4, "num_classes": 10,
}  # fmt: skip
OF_MDT: dict[str, Any] = {"decode_layer": 2, "mask_ratio": 0.3}
FAMILIES = (MDTv2, MDT, DiT)
X, T, Y = torch.randn(3, 4, 8, 8, dtype=torch.float64), torch.tensor([1, 500, 900]), torch.tensor([1, 2, 3])
CONFIG = SampleConfig(steps=3, cfg_scale=2.0, sampler="ddpm", scale_pow=None)


def pair(cls: Any, **changes: Any) -> tuple[Any, Any]:
    """A model and its reference, with the same random weights."""
    torch.manual_seed(0)
    options = SHAPE | ({} if issubclass(cls, DiT) else OF_MDT) | changes
    ours, theirs = cls(**options).double().eval(), getattr(reference, cls.family_name)(**options).double()
    for parameter in ours.parameters():
        parameter.data.normal_(std=0.15)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs.eval()


for each in FAMILIES:
    each.family_name = each.__name__


def passes(model: Any) -> list[Tensor]:
    """A pass over all tokens and, if there are masks, one over those that a mask keeps."""
    with torch.no_grad():
        found = [model(X, T, Y)]
        if not isinstance(model, DiT | reference.DiT):
            torch.manual_seed(2)
            found.append(model(X, T, Y, enable_mask=True))
    return found


def alike(ours: Any, theirs: Any) -> bool:
    return all(
        relative_error(*outputs) < FLOAT64 for outputs in zip(passes(ours), passes(theirs), strict=True)
    )


def sampled(model: Any) -> list[Tensor]:
    return [
        sample(model, DiffusionConfig(), [1, 2], CONFIG, clip_denoised=False, switches=switches)
        for switches in (SampleSwitches(), SampleSwitches.none())
    ]


class Looping(DiT):
    """With the loop that forks of the official code copy."""

    def forward(self, x: Tensor, t: Tensor, y: Tensor, **kwargs: Any) -> Tensor:
        c = self.t_embedder(t) + self.y_embedder(y, False)
        x = self.x_embedder(x, self.pos_embed)
        for block in self.blocks:
            x = block(x, c)
        return unpatchify(self.final_layer(x, c), self.patch_size, self.out_channels)


def test_an_official_loop_over_the_blocks() -> None:
    ours, theirs = pair(Looping)
    assert alike(ours, theirs)
    assert relative_error(*sampled(ours)) < FLOAT64


def test_a_block_called_with_the_positions_of_kept_tokens() -> None:
    ours, theirs = pair(MDTv2)
    x, c, skip = torch.randn(3, 5, 32).double(), torch.randn(3, 32).double(), torch.randn(3, 5, 32).double()
    ids_keep = torch.stack([torch.randperm(16)[:5] for _ in range(3)])
    found, expected = (model.de_blocks[0](x, c, skip, ids_keep) for model in (ours, theirs))
    assert relative_error(found, expected) < FLOAT64


def add_to_c(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return args[0], args[1] + 0.7, *args[2:]


class PlainBlock(nn.Module):
    """A block without adaLN."""

    def forward(self, x: Tensor, c: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return x + c[:, None]


def all_blocks(model: Any) -> list[nn.Module]:
    if isinstance(model, DiT | reference.DiT | MDT | reference.MDT):
        return [*model.blocks, *getattr(model, "sideblocks", ())]
    return [*model.en_inblocks, *model.en_outblocks, *model.de_blocks, *model.sideblocks]


CHANGES: dict[str, Callable[[Any], Any]] = {
    "c changed before blocks": lambda model: [
        block.register_forward_pre_hook(add_to_c) for block in all_blocks(model)
    ],
    "c changed before the last layer": lambda model: model.final_layer.register_forward_pre_hook(add_to_c),
    "a forward set on a block": lambda model: [
        setattr(block, "forward", lambda x, c, *args, f=block.forward, **kwargs: f(x, c - 1, *args, **kwargs))
        for block in all_blocks(model)
    ],
}


def check_change(cls: Any, change: Callable[[Any], Any]) -> None:
    """A change of a model and its reference changes the outputs of both alike, in sampling too."""
    ours, theirs = pair(cls)
    before = passes(ours)[0]
    for model in (ours, theirs):
        change(model)
    assert alike(ours, theirs)
    assert relative_error(passes(ours)[0], before) > 1e-3
    assert relative_error(*sampled(ours)) < FLOAT64


@pytest.mark.parametrize("cls", FAMILIES)
@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_the_conditioning(cls: Any, change: str) -> None:
    check_change(cls, CHANGES[change])


def test_official_parts_in_a_model() -> None:
    ours, theirs = pair(DiT)
    ours.blocks[1], ours.final_layer = theirs.blocks[1], theirs.final_layer
    for model in (ours, theirs):
        model.blocks[2] = PlainBlock()
    ours.blocks[0] = nn.Identity()
    theirs.blocks = theirs.blocks[1:]
    assert alike(ours, theirs)
    assert relative_error(*sampled(ours)) < FLOAT64


def test_parts_that_are_not_told_about_masks() -> None:
    ours, theirs = pair(MDTv2)
    for model in (ours, theirs):
        model.de_blocks[0] = PlainBlock()
    assert alike(ours, theirs)  # the decoder has whole grids
    ours.en_inblocks[0] = theirs.en_inblocks[0]
    assert relative_error(ours(X, T, Y), theirs(X, T, Y)) < FLOAT64
    with pytest.raises(
        UserError, match=r"^model: got a Block in a block's place, expected a Block or a module"
    ):
        ours(X, T, Y, enable_mask=True)
    assert isinstance(theirs.en_inblocks[0], layers.Block)


@pytest.mark.parametrize("where", ["DiT", "Block", "Attention", "Linear"])
def test_a_forward_replaced_in_its_class(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As caching and token merging do it."""
    from mdt_fast.models import attention, blocks

    ours, cls = pair(DiT)[0], {"DiT": DiT, "Linear": nn.Linear}.get(where)
    cls = cls or getattr(blocks, where, None) or getattr(attention, where)
    before, plain = sampled(ours)[0], cls.forward
    monkeypatch.setattr(cls, "forward", lambda self, *args, **kwargs: 1.2 * plain(self, *args, **kwargs))
    fast, slow = sampled(ours)
    assert relative_error(fast, slow) < FLOAT64
    assert relative_error(fast, before) > 1e-3


def test_attention_replaced_in_its_class_is_run_by_the_side_block(monkeypatch: pytest.MonkeyPatch) -> None:
    from mdt_fast.models.attention import Attention

    ours, theirs = pair(MDTv2)
    for cls in (Attention, layers.Attention):
        plain: Any = cls.forward
        monkeypatch.setattr(cls, "forward", lambda *args, plain=plain, **kwargs: 2 * plain(*args, **kwargs))
    assert alike(ours, theirs)


def test_a_decoder_block_without_its_long_skip() -> None:
    ours, theirs = pair(MDTv2)
    before = passes(ours)[0]
    for model in (ours, theirs):
        model.de_blocks[1].skip_linear = None
    theirs.de_blocks[1].forward = lambda x, c, skip=None, f=theirs.de_blocks[1].forward: f(x, c)
    assert alike(ours, theirs)
    assert relative_error(passes(ours)[0], before) > 1e-3


@pytest.mark.parametrize("cls", FAMILIES)
def test_more_or_fewer_blocks(cls: Any) -> None:
    ours, theirs = pair(cls)
    before = passes(ours)
    for model in (ours, theirs):
        if not issubclass(cls, MDTv2):
            model.blocks = model.blocks[:3]
        if not issubclass(cls, DiT):
            model.sideblocks.append(copy.deepcopy(model.sideblocks[0]))
    assert alike(ours, theirs)
    assert relative_error(passes(ours)[-1], before[-1]) > 1e-3


class Stem(nn.Module):
    """An embedder of patches that knows nothing of positions."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.layers = nn.Sequential(nn.Conv2d(4, 16, 3, padding=1), nn.SiLU(), nn.Conv2d(16, 32, 2, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).flatten(2).transpose(1, 2)


def grow(module: nn.Module, args: Any, tokens: Tensor) -> Tensor:
    return 2 * tokens + torch.linspace(-1, 1, 16 * 32).view(1, 16, 32).double()


EMBEDDERS: dict[str, Callable[[Any], Any]] = {
    "another module": lambda model: setattr(model, "x_embedder", Stem().double()),
    "a hook on it": lambda model: model.x_embedder.register_forward_hook(grow),
    "within another": lambda model: setattr(model, "x_embedder", nn.Sequential(model.x_embedder, nn.Tanh())),
}


@pytest.mark.parametrize("change", EMBEDDERS)
@pytest.mark.parametrize("cls", FAMILIES)
def test_an_embedder_of_its_own(cls: Any, change: str) -> None:
    check_change(cls, EMBEDDERS[change])


CONVOLUTIONS: dict[str, dict[str, Any]] = {
    "dilated": {"kernel_size": 2, "stride": 2, "padding": 1, "dilation": 2},
    "overlapping": {"kernel_size": 3, "stride": 2, "padding": 1},
    "in groups": {"kernel_size": 2, "stride": 2, "groups": 2},
    "by circular patches": {"kernel_size": 3, "stride": 2, "padding": 1, "padding_mode": "circular"},
    "by name": {"kernel_size": 2, "stride": 2, "padding": "valid"},
}


@pytest.mark.parametrize("options", CONVOLUTIONS)
@pytest.mark.parametrize("cls", FAMILIES)
def test_convolutions_of_other_kinds(cls: Any, options: str) -> None:
    ours, theirs = pair(cls)
    ours.x_embedder.proj = theirs.x_embedder.proj = nn.Conv2d(4, 32, **CONVOLUTIONS[options]).double()
    assert alike(ours, theirs)


@pytest.mark.parametrize("cls", FAMILIES)
def test_times_below_zero_and_between_integers(cls: Any) -> None:
    """EDM's c_noise and the logarithm of a signal-to-noise ratio are such."""
    ours, theirs = pair(cls)
    t = torch.tensor([-1.5, 0.0, 0.25]).double()
    assert relative_error(ours(X, t, Y), theirs(X, t, Y)) < FLOAT64
