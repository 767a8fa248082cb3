"""Betas, respacing and the arrays made of them, against the golden numbers and closed forms."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from golden_files import load, meta
from mdt_fast.diffusion import GaussianDiffusion, create_diffusion, make_betas, space_timesteps
from mdt_fast.errors import UserError
from tolerances import FLOAT64, relative_error

TAGS = ["full", "r250", "r10", "ddim50", "r2", "sections_10_15_20", "cosine_r20"]


@pytest.mark.parametrize("tag", TAGS)
def test_golden_schedule(tag: str) -> None:
    diffusion = create_diffusion(**meta("diffusion_schedules")[tag]["kwargs"])
    golden = {
        key.removeprefix(f"{tag}/"): value
        for key, value in load("diffusion_schedules").items()
        if key.startswith(f"{tag}/")
    }
    assert diffusion.num_timesteps == meta("diffusion_schedules")[tag]["num_timesteps"]
    assert diffusion.timestep_map == golden.pop("timestep_map").tolist()
    assert len(golden) >= 6
    for name, expected in golden.items():
        assert getattr(diffusion, name).dtype == np.float64
        assert relative_error(torch.from_numpy(getattr(diffusion, name)), expected) <= FLOAT64, name


def test_all_golden_schedules_are_tested() -> None:
    assert {key.split("/")[0] for key in load("diffusion_schedules")} == set(TAGS)


def test_known_respacings() -> None:
    assert space_timesteps(1000, "10") == list(range(0, 1000, 111))
    assert space_timesteps(1000, 10) == list(range(0, 1000, 111))
    assert space_timesteps(1000, "ddim10") == list(range(0, 1000, 100))
    assert space_timesteps(1000, None) == space_timesteps(1000, "") == list(range(1000))
    assert space_timesteps(10, "2,3") == space_timesteps(10, [2, 3]) == [0, 4, 5, 7, 9]
    assert space_timesteps(10, "1,0,1") == [0, 7]  # sections of 4, 3 and 3
    assert space_timesteps(6, "3") == [0, 2, 5]  # 2.5 rounds to the even 2


@given(st.data())
def test_respacing_keeps_the_asked_counts(data: st.DataObject) -> None:
    steps = data.draw(st.integers(1, 400))
    sections = data.draw(st.integers(1, min(4, steps)))
    sizes = [len(part) for part in np.array_split(range(steps), sections)]
    counts = [data.draw(st.integers(1, size)) for size in sizes]
    used = space_timesteps(steps, ",".join(map(str, counts)))
    assert used == sorted(set(used))
    start = 0
    for size, count in zip(sizes, counts, strict=True):
        inside = [t for t in used if start <= t < start + size]
        assert len(inside) == count
        assert inside[0] == start
        assert count == 1 or inside[-1] == start + size - 1
        start += size


def test_a_truth_value_is_no_number_of_steps() -> None:
    with pytest.raises(UserError, match=r"timestep_respacing: got True, expected '250'"):
        create_diffusion(True)


@given(st.integers(1, 1000), st.integers(1, 1000))
def test_ddim_respacing_has_one_stride_or_is_refused(steps: int, count: int) -> None:
    if any(len(range(0, steps, stride)) == count for stride in range(1, steps + 1)):
        used = space_timesteps(steps, f"ddim{count}")
        assert len(used) == count
        assert len(set(np.diff(used))) <= 1
    else:
        with pytest.raises(UserError, match="no whole stride"):
            space_timesteps(steps, f"ddim{count}")


@pytest.mark.parametrize(
    ("respacing", "message"),
    [
        ("1001", "asks for 1001 timesteps in section 1 of 1, expected 0 to 1000"),
        ("10,400,20", "asks for 400 timesteps in section 2 of 3, expected 0 to 333"),
        ("-3", "asks for -3 timesteps"),
        ("0", "expected to keep at least 1"),
        ("0,0", "expected to keep at least 1"),
        ("ten", "got 'ten'"),
        ("10,", "got '10,'"),
        ([], r"got \[\]"),
        (2.5, "got 2.5"),
        ([2.5], r"got \[2.5\]"),
        ("ddim300", "the nearest is 'ddim334'"),
        ("ddim0", "the nearest is 'ddim1'"),
        ("ddim", "no whole stride"),
        ("ddim-5", "no whole stride"),
    ],
)
def test_impossible_respacings_are_refused(respacing: object, message: str) -> None:
    with pytest.raises(UserError, match="^timestep_respacing: .*" + message):
        create_diffusion(respacing)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"noise_schedule": "linaer"}, r"noise_schedule: got 'linaer' \(did you mean 'linear'"),
        ({"diffusion_steps": 0}, "diffusion_steps: got 0, expected 1 or more"),
        ({"diffusion_steps": 20}, "diffusion_steps: the linear schedule needs at least 21, got 20"),
        ({"min_snr_gamma": 0.0}, "min_snr_gamma: got 0.0, expected None or above 0"),
        ({"min_snr_gamma": math.nan}, "min_snr_gamma: got nan, expected None or above 0"),
        ({"min_snr_gamma": 1e308}, "min_snr_gamma: got 1e.308, expected None or above 0, and a float32"),
    ],
)
def test_impossible_schedules_are_refused(kwargs: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        create_diffusion(**kwargs)


def test_betas() -> None:
    linear = make_betas("linear", 1000)
    assert (linear[0], linear[-1]) == (1e-4, 0.02)
    assert np.allclose(make_betas("linear", 100)[[0, -1]], [1e-3, 0.2], rtol=1e-15)
    cosine = make_betas("squaredcos_cap_v2", 1000)
    assert cosine[-1] == 0.999
    signal = math.cos((0.5 + 0.008) / 1.008 * math.pi / 2) ** 2 / math.cos(0.008 / 1.008 * math.pi / 2) ** 2
    assert np.cumprod(1 - cosine)[499] == pytest.approx(signal, rel=1e-12)
    for steps in (21, 50, 4000):
        betas = make_betas("linear", steps)
        assert (betas > 0).all()
        assert (betas < 1).all()


def test_respaced_signal_is_the_original_signal() -> None:
    full, respaced = create_diffusion(), create_diffusion("10,15,20")
    np.testing.assert_allclose(
        respaced.alphas_cumprod, full.alphas_cumprod[respaced.timestep_map], rtol=1e-12
    )


def test_two_step_posterior_is_bayes() -> None:
    diffusion = create_diffusion(noise_schedule="squaredcos_cap_v2", diffusion_steps=2)
    first, second = diffusion.betas
    # p(x_1 | x_0, x_2) from the two Gaussians N(x_1; sqrt(1-b1) x_0, b1) and N(x_2; sqrt(1-b2) x_1, b2).
    variance = 1 / (1 / first + (1 - second) / second)
    assert diffusion.posterior_variance[1] == pytest.approx(variance, rel=1e-12)
    assert diffusion.posterior_mean_coef1[1] == pytest.approx(
        variance * math.sqrt(1 - first) / first, rel=1e-12
    )
    assert diffusion.posterior_mean_coef2[1] == pytest.approx(
        variance * math.sqrt(1 - second) / second, rel=1e-12
    )
    assert diffusion.posterior_variance[0] == 0
    np.testing.assert_allclose(
        np.exp(diffusion.posterior_log_variance_clipped), [variance, variance], rtol=1e-12
    )


@pytest.mark.parametrize("learn_sigma", [True, False])
@pytest.mark.parametrize("sigma_small", [True, False])
def test_one_step_schedule_is_defined(learn_sigma: bool, sigma_small: bool) -> None:
    diffusion = create_diffusion("1", learn_sigma=learn_sigma, sigma_small=sigma_small)
    assert diffusion.timestep_map == [0]
    assert diffusion.posterior_log_variance_clipped.tolist() == np.log(diffusion.betas).tolist()
    x = torch.randn(2, 3, 4, 4)
    output = torch.randn(2, 6 if learn_sigma else 3, 4, 4)
    sample = diffusion.p_sample_loop(lambda x, t: output, x.shape, noise=x, clip_denoised=False)
    expected = diffusion.predict_xstart(x, torch.zeros(2, dtype=torch.int64), output[:, :3])
    assert torch.equal(sample, expected)
    losses = diffusion.training_losses(lambda x, t: output, x, torch.zeros(2, dtype=torch.int64))
    assert losses["loss"].isfinite().all()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("mean_type", "velocity", "mean_type: got 'velocity', expected epsilon, start_x"),
        (
            "var_type",
            "fixed_larg",
            "var_type: got 'fixed_larg' \\(did you mean 'fixed_large'\\?\\)",
        ),
        ("loss_type", "huber", "loss_type: got 'huber', expected mse, rescaled_mse, rescaled_kl"),
    ],
)
def test_words_that_say_nothing(name: str, value: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        GaussianDiffusion(make_betas("linear", 100), range(100), **{name: value})


def test_lookup_rounds_float64_to_float32_once() -> None:
    diffusion = create_diffusion()
    t = torch.tensor([0, 7, 999])
    looked_up = diffusion.lookup("betas", t, torch.empty(3, 2, 4))
    assert looked_up.shape == (3, 2, 4)
    assert looked_up.dtype == torch.float32
    assert looked_up[:, 1, 2].tolist() == diffusion.betas[[0, 7, 999]].astype(np.float32).tolist()


def test_tables_are_copied_once() -> None:
    diffusion = create_diffusion("10").to("cpu")
    tables = dict(diffusion._on_device)
    diffusion.training_losses(lambda x, t: torch.zeros(2, 6, 4), torch.zeros(2, 3, 4), torch.tensor([0, 9]))
    diffusion.ddim_sample_loop(lambda x, t: torch.zeros(2, 6, 4), (2, 3, 4), device="cpu")
    assert diffusion._on_device.keys() == tables.keys()
    assert all(diffusion._on_device[key] is table for key, table in tables.items())


def test_a_trace_leaves_no_table_behind() -> None:
    """``torch.export`` runs the code on tensors without values."""
    diffusion = create_diffusion("10")

    class Noised(torch.nn.Module):
        def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return diffusion.q_sample(x, t, noise=x)

    x, t = torch.ones(2, 3), torch.tensor([0, 9])
    exported = torch.export.export(Noised(), (x, t), strict=False).module()
    assert {type(table) for table in diffusion._on_device.values()} <= {torch.Tensor}
    assert torch.equal(exported(x, t), diffusion.q_sample(x, t, noise=x))


@pytest.mark.parametrize("steps", ["1000", 1000.0, None])
@pytest.mark.parametrize("noise_schedule", ["linear", "squaredcos_cap_v2"])
def test_steps_that_are_no_integer(steps: Any, noise_schedule: str) -> None:
    with pytest.raises(UserError, match=f"^diffusion_steps: got {steps!r}, expected an integer$"):
        create_diffusion(noise_schedule=noise_schedule, diffusion_steps=steps)
