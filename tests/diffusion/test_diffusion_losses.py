"""q, p, the training loss and the bound: golden numbers, a plain float64 derivation, and properties."""

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from golden_files import load, meta
from mdt_fast.diffusion import GaussianDiffusion, create_diffusion
from mdt_fast.diffusion.loss import (
    discretized_gaussian_log_likelihood,
    losses_from_output,
    min_snr_weight,
)
from mdt_fast.errors import UserError
from tolerances import FLOAT32, relative_error

# The loss that each variant of the golden file trains with, for the test's name.
TAGS = {
    "default": "default",
    "r250": "r250",
    "fixed_small": "fixed_small",
    "fixed_large": "fixed_large",
    "rescale_r10": "rescaled_mse_r10",
    "kl": "rescaled_kl",
    "xstart": "xstart",
}
TAG_PARAMS = [pytest.param(tag, id=name) for tag, name in TAGS.items()]
GAMMA = {"v1": None, "v2": 5.0}


def _variant(tag: str, version: str = "v2") -> tuple[GaussianDiffusion, dict[str, Tensor], Tensor]:
    """The process, the golden file, and the output that this variant's model always returns."""
    golden = load("diffusion_losses")
    kwargs = meta("diffusion_losses")[tag]["kwargs"]
    diffusion = create_diffusion(**kwargs, min_snr_gamma=GAMMA[version])
    output = golden["in/model_output"]
    return diffusion, golden, output if kwargs.get("learn_sigma", True) else output[:, :4].clone()


def test_two_passes_of_what_has_none() -> None:
    from mdt_fast import DiT, MDTv2

    shape = {"input_size": 8, "patch_size": 2, "hidden_size": 16, "depth": 4, "num_heads": 2}
    mdt, diffusion = MDTv2(**shape, decode_layer=2, num_classes=3, mask_ratio=0.3), create_diffusion()
    x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([3, 700]), torch.tensor([0, 2])
    assert diffusion.two_pass_losses(mdt, x, t, y)["m_loss"].shape == (2,)
    with pytest.raises(UserError, match=r"model: a DiT has no training_step_outputs; only MDT and MDTv2"):
        diffusion.two_pass_losses(DiT(**shape, num_classes=3), x, t, y)
    with pytest.raises(UserError, match=r"model: a DiT \(in a DataParallel\) has no training_step_out"):
        diffusion.two_pass_losses(torch.nn.DataParallel(DiT(**shape, num_classes=3)), x, t, y)
    for labels, got in (({"y": y}, "a dict"), (y[:1], r"\[1\]"), (y[:, None], r"\[2, 1\]")):
        with pytest.raises(UserError, match=rf"y: got {got}, expected the labels \[2\] themselves"):
            diffusion.two_pass_losses(mdt, x, t, labels)


def test_all_golden_losses_are_tested() -> None:
    assert {key.split("/")[0] for key in load("diffusion_losses")} == {*TAGS, "in"}


@pytest.mark.parametrize("tag", TAG_PARAMS)
@pytest.mark.parametrize("version", ["v1", "v2"])
def test_golden_losses(version: str, tag: str) -> None:
    diffusion, golden, output = _variant(tag, version)
    output.requires_grad_()
    seen = []

    def model(x: Tensor, t: Tensor) -> Tensor:
        seen.append((x, t))
        return output

    terms = diffusion.training_losses(
        model, golden["in/x_start"], golden[f"{tag}/t"], noise=golden["in/noise"]
    )
    names = {key.split("/")[2] for key in golden if key.startswith(f"{tag}/{version}/")}
    assert names == {*terms, "grad_model_output"}
    for name, value in terms.items():
        assert relative_error(value, golden[f"{tag}/{version}/{name}"]) <= FLOAT32, name
    terms["loss"].sum().backward()
    assert relative_error(output.grad, golden[f"{tag}/{version}/grad_model_output"]) <= FLOAT32
    [(x_t, t)] = seen
    assert relative_error(x_t, golden[f"{tag}/x_t"]) <= FLOAT32
    assert torch.equal(t, golden[f"{tag}/t_seen_by_model"])


@pytest.mark.parametrize("tag", TAG_PARAMS)
@pytest.mark.parametrize("clip", ["clip", "noclip"])
def test_golden_p_mean_variance(clip: str, tag: str) -> None:
    diffusion, golden, output = _variant(tag)
    p = diffusion.p_mean_variance(
        lambda x, t: output, golden[f"{tag}/x_t"], golden[f"{tag}/t"], clip_denoised=clip == "clip"
    )
    for name in ("mean", "log_variance", "pred_xstart"):
        assert relative_error(p[name], golden[f"{tag}/p_{clip}_{name}"]) <= FLOAT32, name
    if diffusion.var_type == "fixed_small":  # its log is clipped at t = 0, where the variance is 0
        assert (p["variance"][golden[f"{tag}/t"] == 0] == 0).all()
    else:
        assert relative_error(p["variance"], p["log_variance"].exp()) <= FLOAT32


def test_golden_q_default() -> None:
    diffusion, golden, _ = _variant("default")
    x_start, t = golden["in/x_start"], golden["default/t"]
    x_t = golden["default/x_t"]
    mean, variance, log_variance = diffusion.q_mean_variance(x_start, t)
    posterior_mean, _, posterior_log_variance = diffusion.q_posterior_mean_variance(x_start, x_t, t)
    for name, value in {
        "q_mean": mean,
        "q_var": variance,
        "q_logvar": log_variance,
        "q_post_mean": posterior_mean,
        "q_post_logvar": posterior_log_variance,
        "prior_bpd": diffusion.prior_bpd(x_start),
        "x_t": diffusion.q_sample(x_start, t, golden["in/noise"]),
    }.items():
        assert relative_error(value, golden[f"default/{name}"]) <= FLOAT32, name


def test_golden_bpd() -> None:
    golden = load("diffusion_bpd")
    noises = iter(golden["noises"])
    terms = create_diffusion(str(meta("diffusion_bpd")["respacing"])).calc_bpd_loop(
        lambda x, t: torch.einsum("oc,bchw->bohw", golden["W"], x),
        golden["x_start"],
        clip_denoised=False,
        generator=lambda like: next(noises),
    )
    assert next(noises, None) is None
    assert {f"out/{name}" for name in terms} == {key for key in golden if key.startswith("out/")}
    for name, value in terms.items():
        assert relative_error(value, golden[f"out/{name}"]) <= FLOAT32, name


def test_loss_is_its_plain_float64_derivation() -> None:
    """Recomputes every formula from betas alone, with torch.distributions, in float64."""
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    signal = (1 - betas).cumprod(0)
    x_start, noise, eps, v = torch.randn(4, 3, 4, 5, 5, dtype=torch.float64)
    steps = torch.tensor([1, 400, 999])
    expected = []
    for i, t in enumerate(steps):
        x_t = signal[t].sqrt() * x_start[i] + (1 - signal[t]).sqrt() * noise[i]
        precision = 1 / (1 - signal[t - 1]) + (1 - betas[t]) / betas[t]
        x_0 = (x_t - (1 - signal[t]).sqrt() * eps[i]) / signal[t].sqrt()
        towards_x_t = (1 - betas[t]).sqrt() / betas[t] * x_t

        def posterior(x_0: Tensor, t: Tensor = t, towards_x_t: Tensor = towards_x_t) -> Tensor:
            return signal[t - 1].sqrt() / (1 - signal[t - 1]) * x_0 + towards_x_t

        fraction = (v[i] + 1) / 2
        log_variance = fraction * betas[t].log() + (1 - fraction) * (1 / precision).log()
        true = Normal(posterior(x_start[i]) / precision, (1 / precision).sqrt())
        predicted = Normal(posterior(x_0) / precision, (0.5 * log_variance).exp())
        vb = kl_divergence(true, predicted).mean() / math.log(2)
        snr = signal[t] / (1 - signal[t])
        mse = min(snr, 5) / snr * (noise[i] - eps[i]).square().mean()
        expected.append(torch.stack([mse, vb, mse + vb]))
    output = torch.cat([eps, v], dim=1)
    terms = create_diffusion().training_losses(lambda x, t: output, x_start, steps, noise=noise)
    actual = torch.stack([terms["mse"], terms["vb"], terms["loss"]], dim=1)
    for row, expected_row in zip(actual, expected, strict=True):  # coefficients are float32: so is the error
        assert relative_error(row, expected_row) <= FLOAT32


def test_bound_trains_the_variance_only() -> None:
    output = torch.randn(3, 8, 4, 4, requires_grad=True)
    terms = create_diffusion().training_losses(
        lambda x, t: output, torch.randn(3, 4, 4, 4), torch.tensor([0, 10, 999])
    )
    terms["vb"].sum().backward()
    assert (output.grad[:, :4] == 0).all()
    assert (output.grad[:, 4:] != 0).any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("loss_type", [{}, {"use_kl": True}], ids=str)
def test_half_outputs_are_losses_in_float32(dtype: torch.dtype, loss_type: dict[str, bool]) -> None:
    """The logarithms of the two variances differ by less than a half type's last bit: computed in bfloat16,
    the variance's gradient at t = 500 would be off by fifty times its rounding."""
    diffusion, t = create_diffusion(**loss_type), torch.tensor([0, 5, 50, 500, 999])
    x, noise = torch.randn(2, 5, 4, 8, 8)
    output = torch.cat([noise + 0.05 * torch.randn_like(x), 0.05 * torch.randn_like(x)], dim=1).to(dtype)
    found = []
    for given in (output, output.float()):
        leaf = given.requires_grad_()
        terms = diffusion.training_losses(lambda x, t, leaf=leaf: leaf, x, t, noise=noise)
        terms["loss"].sum().backward()
        found.append((terms, leaf.grad))
    (terms, gradient), (expected, exact) = found
    assert all(torch.equal(terms[name], expected[name]) for name in expected)
    assert torch.equal(gradient, exact.to(dtype))  # rounded once
    p = [
        diffusion.p_mean_variance(lambda x, t, given=given: given, x, t)
        for given in (output.detach(), output.detach().float())
    ]
    assert all(torch.equal(p[0][name], p[1][name]) for name in p[1])
    halves = [a.detach().to(dtype) for a in (output, x, x + noise)]
    ours = losses_from_output(diffusion, *halves, t, noise.to(dtype))
    floats = losses_from_output(diffusion, *(a.float() for a in halves), t, noise.to(dtype).float())
    assert all(torch.equal(ours[name], floats[name]) for name in floats)


def test_min_snr_weight() -> None:
    t = torch.arange(1000)
    weight = min_snr_weight(create_diffusion(), t)
    assert (weight[130:] == 1).all()
    assert weight[0].item() == pytest.approx(5.0e-4, rel=1e-3)
    assert (min_snr_weight(create_diffusion(min_snr_gamma=None), t) == 1).all()
    snr = create_diffusion().alphas_cumprod / (1 - create_diffusion().alphas_cumprod)
    x_start = min_snr_weight(create_diffusion(predict_xstart=True), t)
    assert relative_error(x_start, torch.from_numpy(snr).clamp(max=5)) <= FLOAT32


@pytest.mark.parametrize("scale", [0.02, 0.3, 2.0])
def test_discretized_likelihood_is_a_distribution(scale: float) -> None:
    pixels = torch.linspace(-1, 1, 256, dtype=torch.float64)
    mean = torch.tensor(0.2, dtype=torch.float64)
    log_probs = discretized_gaussian_log_likelihood(pixels, mean, torch.tensor(scale).double().log())
    assert log_probs.exp().sum().item() == pytest.approx(1, abs=1e-6)


def test_noise_is_one_draw_before_the_model() -> None:
    diffusion = create_diffusion(learn_sigma=False)
    x_start, t = torch.randn(2, 3, 4, 4), torch.tensor([3, 700])
    torch.manual_seed(5)
    noise = torch.randn_like(x_start)
    torch.manual_seed(5)
    drawn = diffusion.training_losses(lambda x, t: torch.zeros_like(x), x_start, t)["loss"]
    given = diffusion.training_losses(lambda x, t: torch.zeros_like(x), x_start, t, noise=noise)["loss"]
    assert torch.equal(drawn, given)


def test_losses_and_steps_compile_without_graph_breaks() -> None:
    diffusion = create_diffusion("10").to("cpu")
    layer = torch.nn.Conv2d(4, 8, 1)

    def loss(x: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        return diffusion.training_losses(lambda x, t: layer(x), x, t, noise=noise)["loss"]

    def step(x: Tensor, t: Tensor) -> Tensor:
        return diffusion.ddim_sample(lambda x, t: layer(x), x, t)["sample"]

    x, noise, t = torch.randn(3, 4, 4, 4), torch.randn(3, 4, 4, 4), torch.tensor([0, 5, 9])
    compiled_loss = torch.compile(loss, fullgraph=True, backend="aot_eager")
    compiled_step = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert relative_error(compiled_loss(x, t, noise), loss(x, t, noise)) <= FLOAT32
    assert relative_error(compiled_step(x, t), step(x, t)) <= FLOAT32


def test_tables_made_in_inference_mode_serve_training() -> None:
    diffusion = create_diffusion("10")
    layer = torch.nn.Conv2d(4, 8, 1)
    x, t = torch.randn(2, 4, 4, 4), torch.tensor([0, 9])
    with torch.inference_mode():
        diffusion.training_losses(lambda x, t: layer(x), x, t)
    diffusion.training_losses(lambda x, t: layer(x), x, t)["loss"].sum().backward()
    assert layer.weight.grad.isfinite().all()


@pytest.mark.gpu
def test_losses_never_wait_for_the_gpu() -> None:
    diffusion = create_diffusion().to("cuda")
    x, noise = torch.randn(2, 3, 4, 4, 4, device="cuda")
    output = torch.randn(3, 8, 4, 4, device="cuda")
    t = torch.tensor([0, 10, 999]).cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        diffusion.training_losses(lambda x, t: output, x, t, noise=noise)
        diffusion.p_sample_loop(lambda x, t: output, x.shape, noise=x)
    finally:
        torch.cuda.set_sync_debug_mode("default")
