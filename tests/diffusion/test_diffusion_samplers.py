"""Ancestral and DDIM sampling: golden runs, exact identities between the samplers, and mistakes."""

import copy
import importlib
import math
from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from golden_files import load, meta
from mdt_fast.diffusion import create_diffusion
from mdt_fast.diffusion.sampler import in_a_loop
from mdt_fast.errors import UserError
from tolerances import FLOAT32, relative_error

TAGS = [
    "p10",
    "p10_clip",
    "p10_cfg_pow4",
    "p10_cfg_pow001",
    "ddim10_cfg_pow4",
    "ddim_r10_eta05",
    "v1_p10_cfg_clip",
]
IMPLEMENTATIONS = {"reference": "mdt_fast.reference", "fast": "mdt_fast.models"}


@cache
def _golden_model(implementation: str, name: str) -> nn.Module:
    about = meta(f"{name}.state")
    factory = {"v1": "MDT", "v2": "MDTv2"}[about["version"]]
    model = getattr(importlib.import_module(IMPLEMENTATIONS[implementation]), factory)(**about["config"])
    model.load_state_dict(load(f"{name}.state"))
    return model.eval()


def test_all_golden_sampling_runs_are_tested() -> None:
    assert {key.split("/")[0] for key in load("diffusion_sampling")} == set(TAGS)


@pytest.mark.parametrize("tag", TAGS)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_golden_sampling(implementation: str, tag: str) -> None:
    """Within float32's tolerance, although ten steps amplify a change of the input up to 61 times (metadata).

    Guided runs are compared half by half: the second, unconditional half diverges by construction, and its
    scale would hide an error in the first.
    """
    golden, run = load("diffusion_sampling"), meta("diffusion_sampling")[tag]
    model = _golden_model(implementation, run["model"])
    model_kwargs = {"y": golden[f"{tag}/y"]}
    if run["cfg"]:
        cfg_scale, scale_pow = run["cfg"]
        model_kwargs |= {"cfg_scale": cfg_scale, "scale_pow": scale_pow, "diffusion_steps": 1000}
    noises = iter(golden[f"{tag}/noises"])
    diffusion = create_diffusion(run["respacing"])
    loop = diffusion.p_sample_loop_progressive
    extra = {}
    if run["mode"] == "ddim":
        loop, extra = diffusion.ddim_sample_loop_progressive, {"eta": run["eta"]}
    results = list(
        loop(
            model.forward_with_cfg if run["cfg"] or run.get("via_cfg_fn") else model,
            golden[f"{tag}/z"].shape,
            noise=golden[f"{tag}/z"],
            clip_denoised=run.get("clip", False),
            model_kwargs=model_kwargs,
            generator=lambda like: next(noises),
            **extra,
        )
    )
    assert next(noises, None) is None
    for half in (0, 1) if run["cfg"] else (slice(None),):  # z has one image per half
        assert relative_error(results[-1]["sample"][half], golden[f"{tag}/final"][half]) <= FLOAT32
        for key, name in (("samples", "sample"), ("pred_xstart", "pred_xstart")):
            for result, expected in zip(results, golden.get(f"{tag}/{key}", ())):
                assert relative_error(result[name][half], expected[half]) <= FLOAT32


def _linear_model(x: Tensor, t: Tensor) -> Tensor:
    """A deterministic stand-in for a network with learned variance, in x's dtype."""
    eps = 0.9 * x + 0.05 * torch.sin(3 * x) + (t / 5000).view(-1, 1, 1, 1)
    return torch.cat([eps, torch.tanh(x)], dim=1)


def test_model_and_guide_see_original_timesteps() -> None:
    seen: list[int] = []
    guided: list[int] = []

    def model(x: Tensor, t: Tensor, y: str) -> Tensor:
        seen.append(int(t[0]))
        assert y == "label"
        return _linear_model(x, t)

    def cond_fn(x: Tensor, t: Tensor, y: str) -> Tensor:
        guided.append(int(t[0]))
        return torch.zeros_like(x)

    diffusion = create_diffusion("10")
    for loop in (diffusion.p_sample_loop, diffusion.ddim_sample_loop):
        seen.clear(), guided.clear()
        loop(model, (1, 2, 3, 3), device="cpu", cond_fn=cond_fn, model_kwargs={"y": "label"})
        assert seen == guided == list(range(999, -1, -111))


@pytest.mark.parametrize("mode", ["p_sample_loop", "ddim_sample_loop"])
def test_every_step_draws_noise_once(mode: str) -> None:
    """Including the last step, and DDIM with eta = 0: a seeded run then draws as the published code does."""
    diffusion, shape = create_diffusion("10"), (2, 3, 4, 4)
    torch.manual_seed(3)
    from_seed = getattr(diffusion, mode)(_linear_model, shape, device="cpu")
    after = torch.rand(1)
    torch.manual_seed(3)
    noises = [torch.randn(*shape) for _ in range(11)]
    assert torch.equal(after, torch.rand(1))
    rest = iter(noises[1:])
    given = getattr(diffusion, mode)(_linear_model, shape, noise=noises[0], generator=lambda like: next(rest))
    assert torch.equal(from_seed, given)


def test_generator_repeats_and_leaves_the_default_alone() -> None:
    diffusion = create_diffusion("10")
    before = torch.get_rng_state()
    first, second, other = (
        diffusion.p_sample_loop(
            _linear_model, (1, 3, 4, 4), device="cpu", generator=torch.Generator().manual_seed(seed)
        )
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    assert torch.equal(before, torch.get_rng_state())


def test_ddim_reverse_undoes_ddim() -> None:
    """With a model that always predicts one x_0, both directions follow the same straight line."""
    diffusion = create_diffusion("20", predict_xstart=True, learn_sigma=False)
    x_0, eps = torch.randn(2, 2, 3, 4, 4, dtype=torch.float64)

    def model(x: Tensor, t: Tensor) -> Tensor:
        return x_0

    t = torch.zeros(2, dtype=torch.int64)
    x = start = diffusion.q_sample(x_0, t, eps)
    for step in range(19):
        x = diffusion.ddim_reverse_sample(model, x, t + step, clip_denoised=False)["sample"]
    assert (
        relative_error(x, diffusion.q_sample(x_0, t + 19, eps)) <= 1e-4
    )  # float32 coefficients, 1/sqrt(beta_0)
    for step in range(19, 0, -1):
        x = diffusion.ddim_sample(model, x, t + step, clip_denoised=False)["sample"]
    assert relative_error(x, start) <= FLOAT32
    last = diffusion.ddim_sample(model, x, t, clip_denoised=False)["sample"]
    assert relative_error(last, x_0) <= FLOAT32


def test_ddim_with_eta_1_is_ancestral_with_the_small_variance() -> None:
    """Both are N(posterior mean, posterior variance), so the same noise gives the same step."""
    diffusion = create_diffusion("25", learn_sigma=False, sigma_small=True)
    noise = torch.randn(25, 3, 4, 4, dtype=torch.float64)
    x, draw = torch.randn_like(noise), lambda like: noise
    t = torch.arange(25)

    def model(x: Tensor, t: Tensor) -> Tensor:
        return _linear_model(x, t)[:, :3]

    for clip in (False, True):
        ancestral = diffusion.p_sample(model, x, t, clip, generator=draw)
        ddim = diffusion.ddim_sample(model, x, t, clip, eta=1.0, generator=draw)
        assert relative_error(ddim["sample"], ancestral["sample"]) <= FLOAT32
        assert torch.equal(ddim["pred_xstart"], ancestral["pred_xstart"])


@pytest.mark.parametrize("schedule", ["linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("respacing", ["2", "3", "10", ""])
def test_ddim_with_eta_1_stays_finite(schedule: str, respacing: str) -> None:
    diffusion = create_diffusion(respacing, noise_schedule=schedule)
    t = torch.arange(diffusion.num_timesteps)
    x = torch.randn(len(t), 2, 2, 2)
    assert diffusion.ddim_sample(_linear_model, x, t, eta=1.0)["sample"].isfinite().all()


@pytest.mark.parametrize(("mode", "respacing"), [("ancestral", "10"), ("ddim", "250")])
def test_exact_model_of_a_gaussian_gives_that_gaussian(mode: str, respacing: str) -> None:
    """For x_0 ~ N(m, s^2) the exact noise and variance are known, so sampling must return m and s.

    With both, ancestral steps are exact however few; DDIM solves an equation in steps and needs more.
    """
    m, s = 0.7, 0.4
    diffusion = create_diffusion(respacing)
    original = torch.tensor(diffusion.timestep_map)

    def model(x: Tensor, t: Tensor) -> Tensor:
        index = torch.searchsorted(original, t)
        a, coef1, lower, upper = (
            torch.from_numpy(array)[index].view(-1, 1, 1)
            for array in (
                diffusion.alphas_cumprod,
                diffusion.posterior_mean_coef1,
                diffusion.posterior_log_variance_clipped,
                np.log(diffusion.betas),
            )
        )
        eps = (1 - a).sqrt() * (x - a.sqrt() * m) / (a * s**2 + 1 - a)
        variance_of_x_0 = s**2 * (1 - a) / (a * s**2 + 1 - a)
        variance = lower.exp() + coef1**2 * variance_of_x_0
        v = 2 * (variance.log() - lower) / (upper - lower) - 1
        return torch.cat([eps, v.expand_as(eps)], dim=1).float()

    loop = diffusion.p_sample_loop if mode == "ancestral" else diffusion.ddim_sample_loop
    x = loop(model, (1, 1, 20_000), device="cpu", clip_denoised=False)
    assert x.mean().item() == pytest.approx(m, abs=0.01)
    assert x.std().item() == pytest.approx(s, rel=0.02)


def test_cond_fn_moves_the_mean_by_variance_times_gradient() -> None:
    diffusion = create_diffusion("10")
    x, t, gradient = torch.randn(2, 3, 4, 4), torch.tensor([0, 6]), torch.randn(2, 3, 4, 4)
    p = diffusion.p_mean_variance(_linear_model, x, t)
    moved, plain = (
        diffusion.p_sample(_linear_model, x, t, cond_fn=cond_fn, generator=torch.zeros_like)["sample"]
        for cond_fn in (lambda x, t: gradient, None)
    )
    assert relative_error(moved - plain, p["variance"] * gradient) <= FLOAT32


@pytest.mark.parametrize("mode", ["ddim_sample", "ddim_reverse_sample"])
def test_cond_fn_moves_the_noise_of_ddim(mode: str) -> None:
    """The guided step equals a plain step with the noise eps - sqrt(1 - alphas_cumprod) gradient."""
    diffusion = create_diffusion("10")
    x, t, gradient = torch.randn(2, 3, 4, 4), torch.tensor([2, 6]), torch.randn(2, 3, 4, 4)
    sigma = diffusion.sqrt_one_minus_alphas_cumprod[np.array([2, 6])]

    def moved_model(x: Tensor, t: Tensor) -> Tensor:
        eps, v = _linear_model(x, t).chunk(2, dim=1)
        return torch.cat([eps - torch.tensor(sigma, dtype=x.dtype).view(-1, 1, 1, 1) * gradient, v], dim=1)

    step = getattr(diffusion, mode)
    guided = step(_linear_model, x, t, clip_denoised=False, cond_fn=lambda x, t: gradient)
    plain = step(moved_model, x, t, clip_denoised=False)
    assert relative_error(guided["sample"], plain["sample"]) <= FLOAT32


def test_denoised_fn_comes_before_the_clamp() -> None:
    diffusion = create_diffusion("10")
    x, t = torch.randn(2, 3, 4, 4), torch.tensor([0, 9])
    p = diffusion.p_mean_variance(_linear_model, x, t, denoised_fn=lambda x_0: x_0 * 0 + 3)
    assert (p["pred_xstart"] == 1).all()


def test_loops_leave_grad_mode_alone_and_make_no_graph() -> None:
    weight = torch.ones((), requires_grad=True)
    steps = create_diffusion("10").p_sample_loop_progressive(
        lambda x, t: weight * _linear_model(x, t), (1, 2, 2, 2), device="cpu"
    )
    for result in steps:
        assert torch.is_grad_enabled()
        assert not result["sample"].requires_grad


def test_device_comes_from_the_module_of_a_bound_method() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(()))

        def forward_with_cfg(self, x: Tensor, t: Tensor) -> Tensor:
            return self.weight * _linear_model(x, t)

        forward = forward_with_cfg

    model = Model()
    for callee in (model, model.forward_with_cfg):
        assert create_diffusion("2").p_sample_loop(callee, (1, 2, 2, 2)).device.type == "cpu"


def test_progress_bar_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    create_diffusion("2").ddim_sample_loop(_linear_model, (1, 2, 2, 2), device="cpu", progress=True)
    assert "sampling" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("t", "message"),
    [
        (torch.tensor([0, 10]), "t: got values from 0 to 10, expected 0 to 9"),
        (torch.tensor([-1, 5]), "t: got values from -1 to 5, expected 0 to 9"),
        (torch.tensor([0.0, 1.0]), "t: got torch.float32, expected an int64 tensor of timesteps"),
        (torch.tensor([True, False]), "t: got torch.bool, expected an int64 tensor of timesteps"),
        ([0, 1], "t: got list, expected an int64 tensor of timesteps"),
        (torch.tensor([0, 1], device="meta"), "t: got one on meta, expected one on cpu, where x is"),
        (torch.tensor([0]), r"t: got shape \[1\], expected one timestep per row of x \[2, 3, 4, 4\]"),
        (torch.tensor(3), r"t: got shape \[\], expected one timestep per row of x \[2, 3, 4, 4\]"),
    ],
)
@pytest.mark.parametrize(
    "call",
    [
        lambda d, x, t: d.q_sample(x, t),
        lambda d, x, t: d.q_mean_variance(x, t),
        lambda d, x, t: d.q_posterior_mean_variance(x, x, t),
        lambda d, x, t: d.p_mean_variance(_linear_model, x, t),
        lambda d, x, t: d.p_sample(_linear_model, x, t),
        lambda d, x, t: d.ddim_sample(_linear_model, x, t),
        lambda d, x, t: d.ddim_reverse_sample(_linear_model, x, t),
        lambda d, x, t: d.training_losses(_linear_model, x, t),
    ],
    ids=["q_sample", "q_mean", "q_posterior", "p_mean", "p_sample", "ddim", "ddim_reverse", "losses"],
)
def test_wrong_timesteps_are_named(call, t: Tensor, message: str) -> None:
    with pytest.raises(UserError, match=message):
        call(create_diffusion("10"), torch.randn(2, 3, 4, 4), t)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda d, x, t: d.q_sample(x, t, x[:1]), "noise: got .*, expected the shape of x_start"),
        (lambda d, x, t: d.q_sample(x.to(torch.uint8), t), "x: got torch.uint8, expected a float tensor"),
        (
            lambda d, x, t: d.training_losses(_linear_model, x.to(torch.uint8), t),
            "x: got torch.uint8, expected a float tensor",
        ),
        (
            lambda d, x, t: d.p_sample(_linear_model, x, t, generator=lambda like: like[:1]),
            r"generator: got \[1, 3, 4, 4\], expected the shape of x, \[2, 3, 4, 4\]",
        ),
        (
            lambda d, x, t: d.p_sample(_linear_model, x, t, cond_fn=lambda x, t: x[:, :1]),
            r"cond_fn: got \[2, 1, 4, 4\], expected the shape of x, \[2, 3, 4, 4\]",
        ),
        (lambda d, x, t: d.q_posterior_mean_variance(x, x[:, :1], t), "x_t: got .*, expected the shape"),
        (
            lambda d, x, t: d.training_losses(lambda x, t: x, x, t),
            r"model: got \[2, 3, 4, 4\], expected output \[2, 6, 4, 4\] \(twice the channels of x .*\)",
        ),
        (lambda d, x, t: d.p_sample(lambda x, t: None, x, t), "model: got NoneType, expected output .*"),
        (lambda d, x, t: d.ddim_sample(_linear_model, x, t, eta=1.5), "eta: got 1.5, expected 0 to 1"),
        (
            lambda d, x, t: d.ddim_sample(_linear_model, x, t, eta=math.nan),
            "eta: got nan, expected 0 to 1",
        ),
        (lambda d, x, t: d.ddim_reverse_sample(_linear_model, x, t, eta=0.5), "eta: .* 0 only, got 0.5"),
        (
            lambda d, x, t: d.training_losses(_linear_model, x, t, t),
            "^model_kwargs: got a Tensor, expected a",
        ),
        (lambda d, x, t: d.p_sample(_linear_model, x, t, model_kwargs=[1]), "^model_kwargs: got a list, exp"),
        (
            lambda d, x, t: d.training_losses(_linear_model, x, t, noise=0.5),
            "^noise: got a float, expected a",
        ),
        (lambda d, x, t: d.p_sample_loop(_linear_model, x.shape), "device: must be given"),
        (lambda d, x, t: d.p_sample_loop(nn.Identity(), x.shape), "device: must be given"),
        (
            lambda d, x, t: d.ddim_sample_loop(_linear_model, (2, 3, 5, 5), noise=x),
            r"noise: got \[2, 3, 4, 4\], expected shape \[2, 3, 5, 5\]",
        ),
    ],
)
def test_mistakes_are_named(call, message: str) -> None:
    with pytest.raises(UserError, match=message):
        call(create_diffusion("10"), torch.randn(2, 3, 4, 4), torch.tensor([0, 9]))


def test_fixed_variance_model_must_not_have_extra_channels() -> None:
    with pytest.raises(
        UserError, match=r"model: got \[2, 6, 4, 4\], expected output \[2, 3, 4, 4\] \(that of x\)"
    ):
        create_diffusion("10", learn_sigma=False).p_sample(
            _linear_model, torch.randn(2, 3, 4, 4), torch.tensor([0, 9])
        )


@pytest.mark.parametrize("loop", ["p_sample_loop", "ddim_sample_loop"])
def test_models_of_a_half_type(loop: str) -> None:
    """The loop runs in float32, the model in its own dtype; also as a method, and with noise of either."""
    name = meta("diffusion_sampling")["p10"]["model"]
    model = copy.deepcopy(_golden_model("fast", name)).bfloat16()
    shape = 2, model.in_channels, model.input_size, model.input_size
    noise, kwargs = torch.randn(shape), {"y": torch.tensor([0, 1])}
    drawn = getattr(create_diffusion("4"), loop)
    assert (
        next(in_a_loop(model, 4).parameters()).dtype == torch.bfloat16
    )  # official loops read the device from it
    for given in (noise, noise.bfloat16(), None):
        found = drawn(model, shape, given, model_kwargs=kwargs)
        assert found.dtype == torch.float32
        assert found.isfinite().all()
    guided = drawn(model.forward_with_cfg, shape, noise, model_kwargs={**kwargs, "cfg_scale": 2.0})
    assert guided.isfinite().all()
