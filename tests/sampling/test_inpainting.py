"""Filling in: known parts stay, the rest follows from the seed; tokens are hidden as the model hides them."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import mdt_fast
from mdt_fast.config import DiffusionConfig, ModelConfig, SampleConfig, SampleSwitches
from mdt_fast.errors import UserError
from mdt_fast.masking import MaskPlan
from mdt_fast.models.zoo import build_model
from mdt_fast.sampling import inpaint, sample
from mdt_fast.sampling.inpainting import hidden_tokens

MODEL = ModelConfig(
    family="mdtv2", input_size=8, patch_size=2, in_channels=1, hidden_size=16, depth=4, num_heads=2,
    num_classes=10, decode_layer=2,
)  # fmt: skip
CONFIG = SampleConfig(steps=4, batch_size=8, seed=3)
LABELS = [3, 1, 4, 1, 5]
IMAGE = torch.linspace(-1, 1, 64).view(1, 8, 8)
RIGHT = (torch.arange(8) >= 3).expand(8, 8)  # the second of four columns of tokens is partly known
ALL = torch.ones(8, 8, dtype=torch.bool)
SAMPLERS = {
    "ddim": {"sampler": "ddim"},
    "ddim-eta0.7": {"sampler": "ddim", "eta": 0.7},
    "ddpm": {"sampler": "ddpm"},
    "dpm++": {"sampler": "dpm++"},
    "unipc": {"sampler": "unipc"},
}


def model_of(config: ModelConfig) -> nn.Module:
    """A model with random weights: a fresh one outputs zeros."""
    torch.manual_seed(1)
    model = build_model(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return model_of(MODEL)


def fill(
    model: nn.Module,
    image: Tensor = IMAGE,
    unknown: Tensor = RIGHT,
    labels: list[int] = LABELS,
    *,
    hide: float = 0.0,
    resample: int = 1,
    first_index: int = 0,
    switches: SampleSwitches | None = None,
    **changes,
) -> Tensor:
    return inpaint(
        model, DiffusionConfig(), labels, image, unknown, replace(CONFIG, **changes), hide=hide,
        resample=resample, first_index=first_index, switches=switches or SampleSwitches(),
    )  # fmt: skip


@pytest.mark.parametrize("hide", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
def test_the_known_part_is_the_images(model: nn.Module, sampler: dict, hide: float) -> None:
    drawn = fill(model, hide=hide, **sampler)
    assert (drawn.shape, drawn.dtype) == ((5, 1, 8, 8), torch.float32)
    assert torch.equal(drawn[..., ~RIGHT], IMAGE[..., ~RIGHT].expand(5, -1, -1))
    assert (drawn[0] - drawn[1])[..., RIGHT].abs().max() > 1e-2
    assert drawn.isfinite().all()


@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "plain"])
def test_with_everything_unknown_it_is_sample(model: nn.Module, sampler: dict, fused: bool) -> None:
    switches = SampleSwitches() if fused else SampleSwitches.none()
    config = replace(CONFIG, **sampler)
    drawn = sample(model, DiffusionConfig(), LABELS, config, switches=switches)
    assert torch.equal(fill(model, unknown=ALL, switches=switches, **sampler), drawn)


@pytest.mark.parametrize("hide", [0.0, 1.0])
@pytest.mark.parametrize("cfg_scale", [1.0, 2.0])
def test_a_fill_depends_on_seed_and_index_alone(model: nn.Module, cfg_scale: float, hide: float) -> None:
    how = {"cfg_scale": cfg_scale, "hide": hide, "sampler": "ddpm"}
    whole = fill(model, **how)
    torch.testing.assert_close(fill(model, batch_size=2, **how), whole, rtol=1e-4, atol=1e-4)
    alone = fill(model, labels=[4], first_index=2, **how)
    torch.testing.assert_close(alone[0], whole[2], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(whole, fill(model, seed=4, **how), atol=1e-2)


@pytest.mark.parametrize("hide", [0.0, 1.0])
def test_images_and_masks_of_their_own(hide: float) -> None:
    """With different numbers of hidden tokens, which one batch cannot hold."""
    model, images = (
        model_of(MODEL).double(),
        IMAGE.double() * torch.tensor([1.0, -1, 0.5, 0, 1]).view(5, 1, 1, 1),
    )
    masks = torch.stack([RIGHT, RIGHT, RIGHT.T, RIGHT.flip(1), torch.arange(8).expand(8, 8) >= 6])
    whole = fill(model, images, masks, hide=hide)
    for i in (1, 2, 3, 4):
        alone = fill(model, images[i], masks[i], [LABELS[i]], first_index=i, hide=hide)
        torch.testing.assert_close(alone[0], whole[i], rtol=1e-9, atol=1e-9)


def test_what_is_known_and_how_much_is_hidden_matters(model: nn.Module) -> None:
    plain = fill(model)
    others = {
        "image": fill(model, -IMAGE), "hide": fill(model, hide=1.0), "half": fill(model, hide=0.5),
        "resample": fill(model, resample=2), "ddpm": fill(model, resample=3, sampler="ddpm"),
    }  # fmt: skip
    for name, other in others.items():
        assert not torch.allclose(other[..., RIGHT], plain[..., RIGHT], atol=1e-3), name
    assert not torch.allclose(others["hide"], others["half"], atol=1e-3)


def test_only_tokens_that_are_unknown_altogether_are_hidden() -> None:
    hidden = hidden_tokens(RIGHT[None], 2).view(4, 4)
    assert hidden.tolist() == [[False, False, True, True]] * 4


@pytest.mark.parametrize("family", ["mdtv2", "mdt"])
@pytest.mark.parametrize("cfg_scale", [1.0, 2.5])
def test_a_hidden_step_is_the_models_own_masked_pass(family: str, cfg_scale: float) -> None:
    """One step from noise, against a forward pass with a mask plan and the diffusion's own step."""
    config = replace(MODEL, family=family)
    model, labels = model_of(config).double().eval(), [7, 2]
    settings = replace(CONFIG, steps=1, cfg_scale=cfg_scale, scale_pow=None)
    image, trained = IMAGE.double(), DiffusionConfig(diffusion_steps=50)
    drawn = inpaint(model, trained, labels, image, RIGHT, settings, hide=1.0)

    diffusion = mdt_fast.sampling.sampling_diffusion(config, trained, settings)
    noise, known = (mdt_fast.sampling.generate.PerImageNoise(3, 0, 2, *stream) for stream in ((), (1,)))
    x, t = noise(torch.empty(2, 1, 8, 8).double()), torch.zeros(2, dtype=torch.int64)
    x = torch.where(RIGHT, x, diffusion.q_sample(image.expand(2, -1, -1, -1), t, known(x)))
    kept = torch.tensor([[0, 1, 4, 5, 8, 9, 12, 13]]).expand(4, -1)
    with torch.no_grad():
        output = model(
            torch.cat([x, x]), torch.full((4,), diffusion.timestep_map[0]), torch.tensor([7, 2, 10, 10]),
            mask_plan=MaskPlan.from_keep(kept, 16),
        )  # fmt: skip
    cond, uncond = output.chunk(2)
    guided = uncond[:, :1] + cfg_scale * (cond[:, :1] - uncond[:, :1])
    given = torch.cat([guided, cond[:, 1:]], dim=1)
    expected = diffusion.ddim_sample(lambda x, t: given, x, t, True)["sample"]
    torch.testing.assert_close(drawn, torch.where(RIGHT, expected, image), rtol=1e-9, atol=1e-9)


def test_a_wrapped_model_hides_as_well(model: nn.Module) -> None:
    """With a hook, the model is called whole."""
    expected = fill(model, hide=1.0)
    handle = model.register_forward_hook(lambda module, args, output: output)
    try:
        torch.testing.assert_close(fill(model, hide=1.0), expected, rtol=1e-4, atol=1e-4)
    finally:
        handle.remove()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image": IMAGE[0]}, r"image: got .*, expected floats \[1, 8, 8\] or \[N, 1, 8, 8\]"),
        ({"image": IMAGE.long()}, r"image: got torch.int64 \[1, 8, 8\], expected floats"),
        ({"image": IMAGE / 0}, "image: has values that are not finite"),
        ({"image": IMAGE.double() * 1e300}, "image: has values that are not finite in torch.float32"),
        ({"image": IMAGE.numpy()}, "image: got ndarray, expected a torch.Tensor with values"),
        ({"unknown": RIGHT.numpy()}, "unknown: got ndarray, expected a torch.Tensor with values"),
        ({"image": IMAGE.to("meta")}, "image: got one on the meta device, expected a torch.Tensor"),
        ({"resample": 1.5}, "resample: got 1.5, expected an integer, 1 or more"),
        ({"hide": "a"}, "hide: got 'a', expected 0 to 1"),
        ({"image": IMAGE.repeat(2, 1, 1, 1)}, "image: 5 labels need 1 for all or 1 each, got 2"),
        ({"unknown": RIGHT.float()}, r"unknown: got torch.float32 .*, expected bool \[8, 8\] or \[N, 8, 8\]"),
        ({"unknown": ~ALL}, "unknown: a mask is all False, there is nothing to draw"),
        ({"unknown": torch.stack([ALL, ~ALL] * 2)}, "unknown: a mask is all False"),
        ({"unknown": RIGHT.repeat(3, 1, 1)}, "unknown: 5 labels need 1 for all or 1 each, got 3"),
        ({"hide": 1.5}, "hide: got 1.5, expected 0 to 1"),
        ({"hide": 1.0, "unknown": ALL}, "hide: everything is unknown, the encoder would see no token; use 0"),
        ({"resample": 0}, "resample: got 0, expected an integer, 1 or more"),
        ({"resample": 2, "sampler": "unipc"}, "resample: unipc uses earlier steps and cannot"),
        ({"labels": [10]}, "labels: got 10, expected 0 to 9"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(model: nn.Module, changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        fill(model, **changes)


@pytest.mark.parametrize("changes", [{"family": "dit"}, {"mask_ratio": None}], ids=["dit", "mdt unmasked"])
def test_models_without_masks_fill_in_but_hide_nothing(changes: dict) -> None:
    config = replace(MODEL, **{"mask_ratio": None, **changes})
    if config.family == "dit":
        config = replace(config, decode_layer=0)
    model = model_of(config)
    assert torch.equal(fill(model)[..., ~RIGHT], IMAGE[..., ~RIGHT].expand(5, -1, -1))
    with pytest.raises(UserError, match="hide: the model was not trained with hidden tokens; use 0"):
        fill(model, hide=0.5)


def test_noise_is_drawn_on_the_host_whatever_the_default_device(model: nn.Module) -> None:
    expected = fill(model, hide=0.5)
    with torch.device("meta"):
        assert torch.equal(fill(model, hide=0.5), expected)
