"""The samplers against diffusers' own on the same noise, and against an exact answer.

For Gaussian data the best prediction of the noise is known, and so is where each starting point ends: along
the probability-flow path x_t keeps its place in the distribution of its time.
"""

import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mdt_fast.config import DiffusionConfig, ModelConfig, SampleConfig
from mdt_fast.diffusion import create_diffusion
from mdt_fast.sampling import sample, sampling_diffusion
from mdt_fast.sampling.generate import PerImageNoise
from mdt_fast.sampling.schedulers import SOLVERS
from small_models import made
from tolerances import FLOAT32, relative_error

diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")

MEAN, SPREAD = 0.6, 0.4
CONFIG = ModelConfig(family="mdtv2", input_size=8, patch_size=2, in_channels=4, num_classes=2)
LABELS = [0, 1, 1]
SETTINGS = SampleConfig(steps=20, cfg_scale=1.0, seed=5, batch_size=3)


class Gaussian(nn.Module):
    """The exact answer for data of class y that follows N(+-MEAN, SPREAD^2) in each element."""

    num_classes, in_channels, input_size, config = 2, 4, 8, CONFIG

    def __init__(self, trained: DiffusionConfig):
        super().__init__()
        self.scale = nn.Parameter(torch.ones((), dtype=torch.float64))
        whole = create_diffusion(noise_schedule=trained.noise_schedule)
        self.alphas_cumprod = torch.from_numpy(whole.alphas_cumprod)
        self.predict_xstart = trained.predict_xstart
        self.seen: list[int] = []

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        self.seen.append(int(t[0]))
        a = self.alphas_cumprod[t].view(-1, 1, 1, 1)
        mean = (1 - 2 * y.double()).view(-1, 1, 1, 1) * MEAN
        gain = a.sqrt() * SPREAD**2 / (a * SPREAD**2 + 1 - a)
        x_0 = mean + gain * (x - a.sqrt() * mean)
        value = x_0 if self.predict_xstart else (x - a.sqrt() * x_0) / (1 - a).sqrt()
        return torch.cat([value, torch.tanh(x)], dim=1)


def start() -> Tensor:
    return PerImageNoise(SETTINGS.seed, 0, 3)(torch.empty(3, 4, 8, 8, dtype=torch.float64))


def draw(trained: DiffusionConfig, **changes: Any) -> Tensor:
    model, config = Gaussian(trained), replace(SETTINGS, **changes)
    images = sample(model, trained, LABELS, config, clip_denoised=False)
    assert model.seen == sampling_diffusion(CONFIG, trained, config).timestep_map[::-1]
    return images


TRAINED = {
    f"{schedule}-{'x0' if x0 else 'eps'}": DiffusionConfig(noise_schedule=schedule, predict_xstart=x0)
    for schedule in ("linear", "squaredcos_cap_v2")
    for x0 in (False, True)
}
each_training = pytest.mark.parametrize("trained", TRAINED.values(), ids=TRAINED)


@each_training
def test_every_solver_comes_to_the_exact_answer(trained: DiffusionConfig) -> None:
    """DDIM's error falls with the steps, the fast solvers' falls faster; all end at one picture."""
    model = Gaussian(trained)
    a = model.alphas_cumprod[999]
    mean = (1 - 2 * torch.tensor(LABELS)).view(-1, 1, 1, 1) * MEAN
    exact = mean + SPREAD * (start() - a.sqrt() * mean) / (a * SPREAD**2 + 1 - a).sqrt()
    error: dict[tuple[str, int], float] = {}
    for sampler in ("ddim", "dpm++", "unipc"):
        for steps in (10, 50, 500):
            got = draw(trained, sampler=sampler, steps=steps)
            error[sampler, steps] = (got - exact).square().mean().sqrt().item()
        assert error[sampler, 10] > 2 * error[sampler, 50]
        assert error[sampler, 500] < 0.01
    for fast in ("dpm++", "unipc"):
        assert error[fast, 10] < 0.9 * error["ddim", 10]
        assert error[fast, 50] < 0.2 * error["ddim", 50]


def test_ancestral_steps_come_to_the_right_distribution() -> None:
    trained = TRAINED["linear-eps"]
    model = Gaussian(trained)
    images = sample(model, trained, [0] * 64, replace(SETTINGS, sampler="ddpm", steps=250, batch_size=64))
    assert abs(images.mean().item() - MEAN) < 0.02
    assert abs(images.std().item() - SPREAD) < 0.03


@pytest.mark.parametrize("schedule", ["linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_the_same_as_diffusers_own(sampler: Any, clip: bool, schedule: Any) -> None:
    """DDPMScheduler with a learned range, and DDIMScheduler, on the same noise."""
    trained = DiffusionConfig(noise_schedule=schedule)
    model, steps = Gaussian(trained), 20
    config = replace(SETTINGS, sampler=sampler, steps=steps)
    got = sample(model, trained, LABELS, config, clip_denoised=clip)
    # The respaced process as if trained in so few steps: diffusers spaces timesteps differently.
    respaced = sampling_diffusion(CONFIG, trained, config)
    common: dict[str, Any] = {
        "num_train_timesteps": steps, "trained_betas": respaced.betas.tolist(), "clip_sample": clip,
        "timestep_spacing": "leading",
    }  # fmt: skip
    if sampler == "ddpm":
        scheduler = diffusers.DDPMScheduler(variance_type="learned_range", **common)
    else:
        scheduler = diffusers.DDIMScheduler(set_alpha_to_one=True, **common)
    exact = torch.from_numpy(np.cumprod(1 - respaced.betas))  # diffusers' own are float32
    scheduler.alphas_cumprod = exact
    scheduler.alphas = torch.from_numpy(1 - respaced.betas)
    scheduler.betas = torch.from_numpy(respaced.betas)
    scheduler.set_timesteps(steps)
    noise = PerImageNoise(SETTINGS.seed, 0, 3)
    x = noise(torch.empty(3, 4, 8, 8, dtype=torch.float64))
    for t in scheduler.timesteps.tolist():
        with torch.no_grad():
            output = model(x, torch.full((3,), respaced.timestep_map[t]), torch.tensor(LABELS))
        if sampler == "ddim":
            x = scheduler.step(output[:, :4], t, x, use_clipped_model_output=True).prev_sample
            continue
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                "diffusers.schedulers.scheduling_ddpm.randn_tensor",
                lambda shape, **_: noise(torch.empty(shape, dtype=torch.float64)),
            )
            x = scheduler.step(output, t, x).prev_sample
    assert relative_error(got, x) <= FLOAT32


@pytest.mark.parametrize("sampler", ["dpm++", "unipc"])
def test_timesteps_are_set_and_not_left_to_diffusers(sampler: Any) -> None:
    """Spaced as diffusers' "linspace"; the 0 at which our respacing ends would cost a leap before it."""
    seen = Gaussian(TRAINED["linear-eps"])
    sample(seen, TRAINED["linear-eps"], LABELS, replace(SETTINGS, sampler=sampler, steps=10))
    assert seen.seen == [999, 899, 799, 699, 599, 500, 400, 300, 200, 100]
    scheduler = getattr(diffusers, SOLVERS[sampler])(timestep_spacing="linspace")
    scheduler.set_timesteps(10)
    assert scheduler.timesteps.tolist() == seen.seen


@pytest.mark.parametrize("sampler", ["dpm++", "unipc"])
def test_torchs_default_dtype_does_not_count(sampler: Any) -> None:
    model, config = made("dit", torch.float32), replace(SETTINGS, sampler=sampler, steps=5)
    expected = sample(model, DiffusionConfig(), LABELS, config)
    before = torch.get_default_dtype()
    try:
        for dtype in (torch.float64, torch.bfloat16):
            torch.set_default_dtype(dtype)
            assert torch.equal(sample(model, DiffusionConfig(), LABELS, config), expected)
            assert torch.get_default_dtype() == dtype
    finally:
        torch.set_default_dtype(before)


def test_without_diffusers_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ValueError, match=r"sampler: unipc comes with diffusers, .*pip install"):
        draw(TRAINED["linear-eps"], sampler="unipc")
