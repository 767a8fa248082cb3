"""The guided sampler: seeds, batches, guidance, errors. Its numbers are tested in tests/diffusion."""

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import mdt_fast
from mdt_fast.config import DiffusionConfig, ModelConfig, SampleConfig
from mdt_fast.errors import UserError
from mdt_fast.models.zoo import build_model
from mdt_fast.sampling import sample, sampling_diffusion

MODEL = ModelConfig(
    family="mdtv2", input_size=8, patch_size=2, in_channels=1, hidden_size=16, depth=2, num_heads=2,
    num_classes=10, decode_layer=0,
)  # fmt: skip
CONFIG = SampleConfig(steps=4, batch_size=8, seed=3)
LABELS = [3, 1, 4, 1, 5]


@pytest.fixture(scope="module")
def model() -> nn.Module:
    """A model with random weights: a fresh one outputs zeros."""
    torch.manual_seed(1)
    model = build_model(MODEL)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model


def draw(model: nn.Module, labels: list[int] = LABELS, *, first_index: int = 0, **changes) -> Tensor:
    config = replace(CONFIG, **changes)
    diffusion = sampling_diffusion(MODEL, DiffusionConfig(), config)
    return sample(model, diffusion, labels, config, first_index=first_index)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([1.5], r"labels: got list: \[1.5\], expected a list of integers"),
        (["1"], r"labels: got list: \['1'\], expected a list of integers"),
        (5, "labels: got int: 5, expected a list of integers"),
        (None, "labels: got NoneType: None, expected a list of integers"),
        (torch.tensor([1.0]), "labels: got Tensor, expected a list of integers"),
        ([10], "labels: got 10, expected 0 to 9"),
    ],
)
def test_labels_that_are_none(model: nn.Module, labels: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        draw(model, labels)  # type: ignore[arg-type]


def test_labels_by_any_kind_of_whole_number(model: nn.Module) -> None:
    expected = draw(model)
    assert draw(model, torch.tensor(LABELS)).equal(expected)  # type: ignore[arg-type]
    assert draw(model, np.array(LABELS)).equal(expected)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "int8"}, "dtype: got 'int8', expected"),
        ({"dtype": "float64"}, "dtype: got 'float64'"),
        ({"seed": 1.5}, "seed: got 1.5, expected int"),
        ({"batch_size": 1.5}, "batch_size: got 1.5, expected int"),
        ({"cfg_interval": 5}, "cfg_interval: got 5, expected None or two numbers"),
        ({"steps": "4"}, "steps: got '4', expected 1 to 1000"),
        ({"steps": 2.5}, "steps: got 2.5, expected 1 to 1000"),
        ({"first_index": -1}, "first_index: got -1, expected an integer of 0 or more"),
    ],
)
def test_settings_of_the_wrong_kind(model: nn.Module, changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        draw(model, **changes)


def test_a_model_without_weights_cannot_draw() -> None:
    with torch.device("meta"):
        empty = build_model(MODEL)
    with pytest.raises(UserError, match="meta device"):
        draw(empty)


SAMPLERS = {
    "ddim": {"sampler": "ddim"},
    "ddim-eta0.7": {"sampler": "ddim", "eta": 0.7},
    "ddpm": {"sampler": "ddpm"},
    "dpm++": {"sampler": "dpm++"},
    "unipc": {"sampler": "unipc"},
}


@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
@pytest.mark.parametrize("cfg_scale", [1.0, 2.0])
def test_an_image_depends_on_seed_and_index_alone(model: nn.Module, sampler: dict, cfg_scale: float) -> None:
    whole = draw(model, cfg_scale=cfg_scale, **sampler)
    assert (whole.shape, whole.dtype) == ((5, 1, 8, 8), torch.float32)
    assert torch.equal(whole, draw(model, cfg_scale=cfg_scale, **sampler))
    pieces = draw(model, cfg_scale=cfg_scale, batch_size=2, **sampler)
    torch.testing.assert_close(pieces, whole, rtol=1e-4, atol=1e-4)
    alone = draw(model, [4], first_index=2, cfg_scale=cfg_scale, **sampler)
    torch.testing.assert_close(alone[0], whole[2], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(whole, draw(model, cfg_scale=cfg_scale, seed=4, **sampler), atol=1e-2)


def test_pixels_are_clipped_and_labels_and_guidance_matter(model: nn.Module) -> None:
    whole = draw(model)
    assert whole.abs().max() <= 1
    assert not torch.equal(whole[0], draw(model, [2, *LABELS[1:]])[0])
    assert torch.equal(whole[1], draw(model, [2, *LABELS[1:]])[1])
    for other in ({"cfg_scale": 1.0}, {"cfg_scale": 4.0}, {"scale_pow": None}):
        assert not torch.equal(whole, draw(model, **other))


def test_sampling_leaves_the_default_generator_alone(model: nn.Module) -> None:
    state = torch.get_rng_state()
    draw(model, sampler="ddpm")
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm++", "unipc"])
def test_noise_is_drawn_on_the_host_whatever_the_default_device(model: nn.Module, sampler: str) -> None:
    how = {"sampler": sampler, "cfg_interval": (100.0, 900.0)}
    expected = draw(model, **how)
    with torch.device("meta"):
        assert torch.equal(draw(model, **how), expected)


@pytest.mark.parametrize(
    ("labels", "changes", "message"),
    [
        ([10], {}, r"labels: got 10, expected 0 to 9"),
        ([-1], {}, r"labels: got -1, expected 0 to 9"),
        (LABELS, {"steps": 0}, r"steps: got 0, expected 1 to 1000"),
        (LABELS, {"steps": 1001}, r"steps: got 1001, expected 1 to 1000"),
        (LABELS, {"batch_size": 0}, r"batch_size: got 0, expected 1 or more"),
        (LABELS, {"cfg_scale": float("nan")}, r"cfg_scale: got nan, expected 0 or more"),
        (LABELS, {"cfg_scale": float("inf")}, r"cfg_scale: got inf, expected a finite number"),
        (LABELS, {"scale_pow": float("inf")}, r"scale_pow: got inf, expected a finite number"),
        (LABELS, {"scale_pow": float("nan")}, r"scale_pow: got nan, expected 0 or more"),
        (LABELS, {"eta": float("nan")}, r"eta: got nan, expected 0 or more"),
        (LABELS, {"eta": 7.0}, r"eta: got 7.0, expected at most 1"),
        (LABELS, {"seed": -1}, r"seed: got -1, expected 0 or more"),
        (LABELS, {"skip_below": -0.1}, r"skip_below: got -0.1, expected 0 or more"),
        (LABELS, {"cfg_interval": (0.9, 0.1)}, r"cfg_interval: got 0.9,0.1, expected LOW,HIGH with"),
        (LABELS, {"sampler": "dpm+"}, r"sampler: got 'dpm\+' \(did you mean 'dpm\+\+'\?\)"),
        (LABELS, {"sampler": "dpm++", "steps": 1}, r"steps: got 1, expected 2 to 999 with dpm\+\+"),
        (LABELS, {"sampler": "unipc", "steps": 1000}, r"steps: got 1000, expected 2 to 999 with unipc"),
        (LABELS, {"sampler": "unipc", "eta": 0.5}, r"eta: only ddim has one; use 0 with unipc, got 0.5"),
    ],
)
def test_impossible_settings_are_named(
    model: nn.Module, labels: list[int], changes: dict, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        draw(model, labels, **changes)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm++"])
def test_a_process_whose_variance_is_not_the_models_is_named(sampler: str) -> None:
    config = replace(CONFIG, sampler=sampler)
    for learned, got in (
        (True, "fixed_large, expected learned_range"),
        (False, "learned_range, expected fix"),
    ):
        about = replace(MODEL, learn_sigma=learned)
        other = sampling_diffusion(replace(MODEL, learn_sigma=not learned), DiffusionConfig(), config)
        with pytest.raises(UserError, match=f"diffusion: got var_type {got}"):
            sample(build_model(about), other, LABELS, config)


def test_a_model_without_null_class_cannot_be_guided() -> None:
    config = replace(MODEL, class_dropout_prob=0.0)
    unguided = build_model(config)
    diffusion = sampling_diffusion(config, DiffusionConfig(), CONFIG)
    with pytest.raises(UserError, match="trained without label dropout"):
        sample(unguided, diffusion, LABELS, CONFIG)
    assert sample(unguided, diffusion, LABELS, replace(CONFIG, cfg_scale=1.0)).shape == (5, 1, 8, 8)


def test_the_public_function_takes_what_the_model_was_trained_with(model: nn.Module) -> None:
    """``mdt_fast.sample`` with a ``DiffusionConfig`` gives the same as with that process, respaced."""
    config = replace(CONFIG, sampler="ddpm", steps=3)
    trained = DiffusionConfig(noise_schedule="squaredcos_cap_v2")
    got = mdt_fast.sample(model, trained, LABELS, config)
    diffusion = sampling_diffusion(MODEL, trained, config)
    assert torch.equal(got, sample(model, diffusion, LABELS, config, clip_denoised=True))


def test_a_process_that_is_not_respaced_is(model: nn.Module) -> None:
    """``config.steps`` of its steps are taken; a respaced process keeps all of its own."""
    model_of_fixed = build_model(replace(MODEL, learn_sigma=False))
    with torch.no_grad():
        for parameter in model_of_fixed.parameters():
            parameter.normal_(std=0.3)
    steps: list[int] = []
    listen = {"on_step": lambda done, of: steps.append(of)}
    for sampler in ("ddim", "unipc"):
        config = replace(CONFIG, sampler=sampler)
        got = mdt_fast.sample(model, mdt_fast.create_diffusion(), LABELS, config, **listen)
        assert torch.equal(got, mdt_fast.sample(model, DiffusionConfig(), LABELS, config))
    other = {"predict_xstart": True, "learn_sigma": False, "noise_schedule": "squaredcos_cap_v2"}
    whole, fewer = (mdt_fast.create_diffusion(n, **other, sigma_small=True) for n in ("", "4"))
    assert torch.equal(*(mdt_fast.sample(model_of_fixed, d, LABELS, CONFIG) for d in (whole, fewer)))
    mdt_fast.sample(model, mdt_fast.create_diffusion("7"), [1], CONFIG, **listen)
    assert steps == [4] * 8 + [7] * 7
    few = mdt_fast.create_diffusion(diffusion_steps=100)
    with pytest.raises(UserError, match="steps: got 200, expected 1 to 100"):
        mdt_fast.sample(model, few, [1], replace(CONFIG, steps=200))


def test_a_model_in_training_goes_on_with_it(model: nn.Module) -> None:
    config = replace(CONFIG, steps=1)
    expected = mdt_fast.sample(model.eval(), DiffusionConfig(), LABELS, config)
    assert not model.training
    half = copy.deepcopy(model).train()
    frozen = half.get_submodule("y_embedder").eval()
    image, unknown = torch.zeros(1, 8, 8), torch.ones(8, 8, dtype=torch.bool)
    assert torch.equal(mdt_fast.sample(half, DiffusionConfig(), LABELS, config), expected)
    mdt_fast.inpaint(half, DiffusionConfig(), LABELS, image, unknown, config)
    with pytest.raises(UserError):
        mdt_fast.sample(half, DiffusionConfig(), [10], config)
    assert half.training
    assert not any(module.training for module in frozen.modules())
    assert all(module.training for module in half.children() if module is not frozen)


@pytest.mark.parametrize(
    ("channels", "wanted", "guided"), [(3, None, 3), (4, None, 3), (4, 4, 4), (16, None, 16), (16, 5, 5)]
)
def test_which_channels_are_guided(channels: int, wanted: int | None, guided: int) -> None:
    model = build_model(replace(MODEL, in_channels=channels))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    config = replace(CONFIG, steps=1, scale_pow=None, guided_channels=wanted)
    one, three = (
        mdt_fast.sample(model, DiffusionConfig(), [1], replace(config, cfg_scale=s), clip_denoised=False)
        for s in (1.0, 3.0)
    )
    moved = (one - three).abs().amax((0, 2, 3)) > 1e-2  # by more than rounding
    assert moved.tolist() == [i < guided for i in range(channels)]
    with pytest.raises(UserError, match=f"guided_channels: got 0, expected None or 1 to {channels}"):
        mdt_fast.sample(model, DiffusionConfig(), [1], replace(config, guided_channels=0))


def test_latents_are_not_clipped_and_pixels_are() -> None:
    """By default the number of channels decides."""
    for channels in (3, 4):
        latents = build_model(replace(MODEL, in_channels=channels))
        with torch.no_grad():
            for parameter in latents.parameters():
                parameter.normal_(std=0.3)
        drawn = mdt_fast.sample(latents, DiffusionConfig(), [1, 2], replace(CONFIG, steps=3))
        assert bool(drawn.abs().max() <= 1) == (channels == 3)


@pytest.mark.parametrize("draw", [mdt_fast.sample, mdt_fast.inpaint])
def test_arguments_of_another_kind(model: nn.Module, draw: Any) -> None:
    rest = () if draw is mdt_fast.sample else (torch.zeros(1, 8, 8), torch.ones(8, 8, dtype=torch.bool))
    diffusion = "GaussianDiffusion or a DiffusionConfig"
    with pytest.raises(UserError, match=f"^diffusion: got a list, expected a {diffusion}$"):
        draw(model, [1, 2], CONFIG, *rest)
    for trained in (DiffusionConfig(), mdt_fast.create_diffusion(), mdt_fast.create_diffusion("4")):
        with pytest.raises(UserError, match=r"^config: got a dict, expected a SampleConfig$"):
            draw(model, trained, [1, 2], *rest, {"steps": 5})
    with pytest.raises(UserError, match=r"^scale_pow: got '4', expected float or None or 'auto'$"):
        draw(model, DiffusionConfig(), [1, 2], *rest, replace(CONFIG, scale_pow="4"))
