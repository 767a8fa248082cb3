"""``cfg_step`` against the samplers of ``mdt_fast.diffusion``, along whole loops; and its refusals.

Runs twice: on the plain path, and (marked ``interpreter``) as the Triton kernel in Triton's interpreter.
"""

import importlib.util
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mdt_fast import MDT, MDTv2
from mdt_fast.diffusion import create_diffusion
from mdt_fast.diffusion.guidance import guide, power_cosine_scale
from mdt_fast.kernels import cfg_step, ddim_coefficients, ddpm_coefficients
from mdt_fast.kernels.backends import INTERPRETING
from mdt_fast.kernels.cfg_step import reference
from tolerances import FLOAT32, FLOAT64, HALF_FACTOR, relative_error

PATH = pytest.param(
    "interpreter",
    marks=[
        pytest.mark.interpreter,
        pytest.mark.skipif(not INTERPRETING, reason="needs TRITON_INTERPRET=1 in the environment"),
    ],
)
both_paths = pytest.mark.parametrize("path", ["plain", PATH])


def model(x: Tensor, t: Tensor) -> Tensor:
    """A smooth function with twice the channels."""
    x = x * (1 + t.view(-1, 1, 1, 1) / 1000)
    return torch.cat([torch.sin(x), torch.cos(3 * x) * 0.8], dim=1)


@both_paths
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize(("kind", "eta"), [("ddpm", None), ("ddim", 0.0), ("ddim", 0.7), ("ddim", 1.0)])
def test_a_loop_of_ten_steps(kind: str, eta: float | None, clip: bool, path: str) -> None:
    """With the sampler's noise and guidance (3 of 4 channels), each step from the sampler's own state."""
    diffusion = create_diffusion("10")
    a = diffusion.alphas_cumprod
    table = ddpm_coefficients(a) if eta is None else ddim_coefficients(a, eta)
    noise = torch.randn(11, 6, 4, 5, 3, generator=torch.Generator().manual_seed(0))
    scale = torch.tensor([3.0, 1.0, 0.5])

    def guided(x: Tensor, t: Tensor) -> Tensor:
        return guide(*model(x, t).chunk(2), scale, channels=3)

    x = noise[10]
    for i in range(9, -1, -1):
        t = torch.full((6,), i)
        output = model(x, diffusion.original_timesteps(t))
        sample, xstart = cfg_step(output, x, noise[i], table[i], scale=scale, kind=kind, clip_denoised=clip)
        step = diffusion.p_sample if eta is None else partial(diffusion.ddim_sample, eta=eta)
        expected = step(guided, x, t, clip_denoised=clip, generator=lambda like, i=i: noise[i])
        x = expected["sample"]
        assert relative_error(xstart, expected["pred_xstart"]) <= FLOAT32
        assert relative_error(sample, x) <= FLOAT32


@pytest.mark.parametrize(
    ("cls", "cfg_scale", "scale_pow"), [(MDTv2, 4.0, 0.01), (MDTv2, 3.8, 4.0), (MDT, 5.0, 0.01)]
)
@pytest.mark.parametrize("eta", [None, 0.0], ids=["ddpm", "ddim"])
def test_samples_of_a_model(cls: Any, cfg_scale: float, scale_pow: float, eta: float | None) -> None:
    """Noise to pictures with both versions' published scales: ``forward_with_cfg`` in the sampler's loop
    against plain ``forward`` and ``cfg_step``."""
    net = cls(input_size=8, hidden_size=32, depth=4, num_heads=2, num_classes=10, decode_layer=2).eval()
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.05)
    diffusion = create_diffusion("10")
    labels = torch.tensor([3, 7, 10, 10])
    noise = torch.randn(11, 4, 4, 8, 8)
    draws = iter(noise)
    loop = diffusion.p_sample_loop if eta is None else partial(diffusion.ddim_sample_loop, eta=eta)
    expected = loop(
        net.forward_with_cfg,
        noise[0].shape,
        clip_denoised=False,
        model_kwargs={"y": labels, "cfg_scale": cfg_scale, "scale_pow": scale_pow},
        generator=lambda like: next(draws),
        device="cpu",
    )

    a = diffusion.alphas_cumprod
    table = ddpm_coefficients(a) if eta is None else ddim_coefficients(a, eta)
    draws = iter(noise)
    x = next(draws)
    with torch.inference_mode():
        for i in range(9, -1, -1):
            t = diffusion.original_timesteps(torch.full((4,), i))
            output = net(torch.cat([x[:2], x[:2]]), t, labels)
            scale = power_cosine_scale(t[:2], cfg_scale, scale_pow=scale_pow)
            kind = "ddpm" if eta is None else "ddim"
            x, _ = cfg_step(output, x, next(draws), table[i], scale=scale, kind=kind)
    assert relative_error(x, expected) <= FLOAT32


@both_paths
@pytest.mark.parametrize("kind", ["ddpm", "ddim"])
@pytest.mark.parametrize("learned", [True, False])
def test_the_conditional_half_alone(kind: str, learned: bool, path: str) -> None:
    """``x`` [n] with both halves' outputs gives the first half of what ``x`` [2n] gives, bit for bit."""
    x, noise = torch.randn(2, 6, 4, 5, 3, generator=torch.Generator().manual_seed(0))
    output = model(x, torch.full((6,), 500))[:, : 8 if learned else 4]
    row = (ddpm_coefficients if kind == "ddpm" else ddim_coefficients)([0.9, 0.5, 0.2])[1]
    scale = torch.tensor([3.0, 1.0, 0.5])
    whole = cfg_step(output, x, noise, row, scale=scale, kind=kind)
    half = cfg_step(output, x[:3], noise[:3], row, scale=scale, kind=kind)
    for got, expected in zip(half, whole, strict=True):
        assert torch.equal(got, expected[:3])


@both_paths
@pytest.mark.parametrize("kind", ["ddpm", "ddim"])
def test_nan_is_not_clipped_away(kind: str, path: str) -> None:
    """A diverging model must stay visible, as with ``clamp``."""
    args = arguments(2, 4, 4, torch.float32, False)
    if kind == "ddim":
        args["coefficients"] = ddim_coefficients([0.9, 0.5])[1]
    args["output"][0, 3, 1, 2] = torch.nan
    for result in cfg_step(**args, scale=2.0, kind=kind, clip_denoised=True):
        assert result[0, 3, 1, 2].isnan()
        assert result.isnan().sum() == 1


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
@pytest.mark.skipif(INTERPRETING, reason="needs the compiler, not the interpreter")
def test_compiled_clip_keeps_nan() -> None:
    """PTX's plain ``max`` and ``min`` drop NaN, which Triton's interpreter does not show."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from mdt_fast.kernels.cfg_step.aot import cases

    case = next(iter(cases("sm_80")))
    case = replace(case, constants={**case.constants, "CLIP": True})
    names = case.kernel.arg_names
    signature = {name: "constexpr" if name in case.constants else case.dtypes[name] for name in names}
    constants = {(names.index(name),): value for name, value in case.constants.items()}
    source = ASTSource(case.kernel, signature, constants)
    ptx = triton.compile(source, target=GPUTarget("cuda", 80, 32)).asm["ptx"]
    assert "max.NaN.f32" in ptx
    assert "max.f32" not in ptx
    assert "min.f32" not in ptx


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_fixed_variance_and_start_x(variance: str) -> None:
    diffusion = create_diffusion(
        "7", learn_sigma=False, sigma_small=variance == "fixed_small", predict_xstart=True
    )
    table = ddpm_coefficients(diffusion.alphas_cumprod, variance)
    x, noise = torch.randn(2, 3, 4, 4, 4)
    for i in (6, 3, 0):
        expected = diffusion.p_sample(
            lambda x, t: torch.sin(x),
            x,
            torch.full((3,), i),
            clip_denoised=False,
            generator=lambda like: noise,
        )
        sample, _ = cfg_step(torch.sin(x), x, noise, table[i], predicts="start_x")
        assert relative_error(sample, expected["sample"]) <= FLOAT32


def arguments(B: int, C: int, side: int, dtype: torch.dtype, rows: bool) -> dict[str, Any]:
    torch.manual_seed(0)
    table = ddpm_coefficients(create_diffusion("50").alphas_cumprod)
    return {
        "output": torch.randn(B, 2 * C, side, side).to(dtype), "x": torch.randn(B, C, side, side),
        "noise": torch.randn(B, C, side, side), "coefficients": table[:B] if rows else table[7],
    }  # fmt: skip


@pytest.mark.interpreter
@pytest.mark.skipif(not INTERPRETING, reason="needs TRITON_INTERPRET=1 in the environment")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@pytest.mark.parametrize("kind", ["ddpm", "ddim"])
@pytest.mark.parametrize(
    ("B", "C", "side", "rows", "scale", "guided"),
    [(2, 4, 8, False, 3.8, 3), (6, 1, 5, True, None, 0), (4, 4, 33, True, 2.0, 4), (2, 4, 6, False, 0.0, 0)],
)
def test_kernel(
    B: int, C: int, side: int, rows: bool, scale: float | None, guided: int, kind: str, dtype: torch.dtype
) -> None:
    args = arguments(B, C, side, dtype, rows)
    if kind == "ddim":
        table = ddim_coefficients(create_diffusion("50").alphas_cumprod, 0.5)
        args["coefficients"] = table[:B] if rows else table[7]
    ours = cfg_step(**args, scale=scale, guided_channels=guided, kind=kind)
    again = cfg_step(**args, scale=scale, guided_channels=guided, kind=kind)
    scale_n = None if scale is None else torch.full((B // 2,), scale)
    rows_BK = args["coefficients"].expand(B, -1).double()
    exact = reference.cfg_step(
        args["output"].double(), args["x"].double(), args["noise"].double(), rows_BK, scale_n, guided, kind,
        "epsilon", False,
    )  # fmt: skip
    for a, b, e in zip(ours, again, exact, strict=True):
        assert a.dtype == torch.float32
        assert torch.equal(a, b)
        assert relative_error(a, e) <= FLOAT32


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64], ids=str)
def test_a_number_guides_the_same_whatever_the_default_dtype(default: torch.dtype) -> None:
    args: dict[str, Any] = {"output": torch.randn(2, 8, 4), "x": torch.randn(2, 4, 4), "noise": None}
    row = ddim_coefficients([0.9, 0.3])[1]
    expected = cfg_step(**args, coefficients=row, scale=torch.full((1,), 3.8001), kind="ddim")
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(default)
        ours = cfg_step(**args, coefficients=row, scale=3.8001, kind="ddim")
    finally:
        torch.set_default_dtype(before)
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


@both_paths
def test_half_latents(path: str) -> None:
    args = dict(arguments(2, 4, 8, torch.float16, False).items())
    args |= {name: args[name].half() for name in ("x", "noise")}
    sample, xstart = cfg_step(**args, scale=2.0)
    exact = cfg_step(**{k: v if k == "coefficients" else v.double() for k, v in args.items()}, scale=2.0)
    assert sample.dtype == torch.float16
    for a, e in zip((sample, xstart), exact, strict=True):
        assert relative_error(a, e) <= HALF_FACTOR * torch.finfo(torch.float16).eps


def test_double_stays_double() -> None:
    args = arguments(2, 4, 4, torch.float64, False)
    args |= {name: args[name].double() for name in ("x", "noise")}
    sample, _ = cfg_step(**args, scale=1.0)
    assert sample.dtype == torch.float64
    unguided, _ = cfg_step(**args)
    first = cfg_step(**args, scale=1.0, guided_channels=0)[0]
    assert relative_error(first, unguided) <= FLOAT64


@both_paths
def test_nothing_and_no_noise(path: str) -> None:
    table = ddpm_coefficients([0.9, 0.5])
    for shape in ((0, 4, 8, 8), (2, 4, 0, 8)):
        x = torch.randn(shape)
        sample, xstart = cfg_step(torch.randn(shape[0], 8, *shape[2:]), x, x, table[0], scale=3.0)
        assert sample.shape == xstart.shape == x.shape
    x = torch.randn(2, 4, 3, 3)
    output = torch.randn(2, 8, 3, 3)
    still, _ = cfg_step(output, x, None, table[1])
    assert torch.equal(still, cfg_step(output, x, torch.zeros_like(x), table[1])[0])


@both_paths
def test_compiles(path: str) -> None:
    args = arguments(2, 4, 8, torch.float32, False)
    step = partial(cfg_step, scale=2.5)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for a, b in zip(step(**args), compiled(**args), strict=True):
        assert torch.equal(a, b)


@pytest.mark.interpreter
@pytest.mark.skipif(not INTERPRETING, reason="needs TRITON_INTERPRET=1 in the environment")
def test_opcheck() -> None:
    from mdt_fast.kernels.cfg_step.triton_op import cfg_step_fwd

    args = arguments(2, 4, 8, torch.float32, True)
    torch.library.opcheck(cfg_step_fwd.overload, (*args.values(), torch.ones(1), 3, "ddpm", "epsilon", False))


@pytest.mark.parametrize("eta", [None, 0.5])
def test_coefficients_of_one_step(eta: float | None) -> None:
    a = create_diffusion("1").alphas_cumprod
    table = ddpm_coefficients(a) if eta is None else ddim_coefficients(a, eta)
    assert table.shape == (1, 7 if eta is None else 5)
    assert table.isfinite().all()
    assert table[0, -1] == 0


GOOD: dict[str, Any] = {
    "output": torch.zeros(2, 8, 4, 4), "x": torch.zeros(2, 4, 4, 4), "noise": torch.zeros(2, 4, 4, 4),
    "coefficients": torch.zeros(7), "scale": 2.0,
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"output": torch.zeros(2, 6, 4, 4)}, r"output: shape \[2, 6, 4, 4\], expected \[2, 8, 4, 4\]"),
        (
            {"x": torch.zeros(2, 4, 4, 4).int()},
            "x: dtype torch.int32, expected float16, bfloat16, float32 or float64",
        ),
        ({"noise": torch.zeros(1, 4, 4, 4)}, r"noise: shape \[1, 4, 4, 4\], expected \[2, 4, 4, 4\]"),
        ({"coefficients": torch.zeros(5)}, r"coefficients: shape \[5\], expected \[7\]"),
        ({"coefficients": torch.zeros(3, 7)}, r"coefficients: shape \[3, 7\], expected \[2, 7\]"),
        (
            {"coefficients": torch.zeros(7).double()},
            "coefficients: torch.float64 on cpu, expected torch.float32",
        ),
        ({"scale": torch.ones(2)}, r"scale: shape \[2\], expected \[1\]"),
        ({"guided_channels": 5}, "guided_channels: got 5, expected 0 to 4"),
        ({"kind": "euler"}, "kind: got 'euler', expected ddpm, ddim"),
        ({"predicts": "v"}, "predicts: got 'v', expected epsilon, start_x"),
        ({"x": torch.zeros(2, 4, 4, 4, requires_grad=True)}, "x: needs a gradient, a sampling step has none"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_refusals(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cfg_step(**(GOOD | change))


def test_an_odd_batch_has_no_halves() -> None:
    args = {k: v[:1] if isinstance(v, Tensor) and v.ndim > 1 else v for k, v in GOOD.items()}
    with pytest.raises(ValueError, match="x: 1 samples, guidance needs an even number"):
        cfg_step(**args)


@pytest.mark.parametrize("values", [[], [0.5, 0.9], [1.0, 0.5], [0.5, 0.0], [[0.5]], [0.5, float("nan")]])
def test_no_schedule(values: list[float]) -> None:
    for make in (ddpm_coefficients, ddim_coefficients):
        with pytest.raises(ValueError, match="alphas_cumprod: got shape"):
            make(values)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(
    "values", [[1 - 1e-9, 0.5], [1 - 1e-9, 1 - 2e-9, 0.3], [0.9, 1e-50, 1e-60], [0.9, 1e-44, 3e-45]], ids=str
)
def test_numbers_that_float32_rounds_to_1_or_0(values: list[float], eta: float) -> None:
    """As computed in float64; only the factor of x_0 may be rounded further, to 0."""
    a = torch.tensor(values, dtype=torch.float64)
    prev = torch.cat([a.new_ones(1), a[:-1]])
    sigma = eta * ((1 - prev) / (1 - a) * (1 - a / prev)).sqrt()
    direction = (1 - prev - sigma**2).clamp(min=0).sqrt()
    expected = torch.stack([(1 / a).sqrt(), (1 / a - 1).sqrt(), prev.sqrt(), direction, sigma], dim=1)
    expected[0, 4] = 0
    torch.testing.assert_close(ddim_coefficients(values, eta).double(), expected, rtol=1e-6, atol=1e-4)


def test_numbers_whose_reciprocals_no_float32_holds() -> None:
    for make in (ddpm_coefficients, ddim_coefficients):
        assert make([0.5, 1e-76]).isfinite().all()
        with pytest.raises(ValueError, match=r"alphas_cumprod: got 1e-77, expected 1e-76 or more"):
            make([0.5, 1e-77])


def test_bad_names() -> None:
    with pytest.raises(ValueError, match="variance: got 'fixed', expected learned_range"):
        ddpm_coefficients([0.5], "fixed")
    with pytest.raises(ValueError, match=r"eta: got 2\.0, expected 0 to 1"):
        ddim_coefficients([0.5], 2.0)


def test_numbers_of_all_kinds_guide() -> None:
    args: dict[str, Any] = {"output": torch.randn(4, 8, 2), "x": torch.randn(2, 4, 2), "noise": None}
    row = ddim_coefficients([0.9, 0.3])[1]

    def step(scale: Any) -> Tensor:
        return cfg_step(**args, coefficients=row, scale=scale, kind="ddim")[0]

    expected = {number: step(torch.full((2,), number)) for number in (2.0, 3.0, 4.0)}
    for scale in (2, np.float32(2), np.int64(2)):
        assert torch.equal(step(scale), expected[2.0])
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for number, result in expected.items():  # from the second one on it is symbolic
        assert relative_error(compiled(number), result) <= FLOAT32
