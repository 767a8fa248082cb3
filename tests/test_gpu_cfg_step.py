"""``cfg_step`` on a GPU: NaN, many samples, Inductor, a captured loop, no waiting for the device."""

import pytest
import torch
from torch import Tensor

from mdt_fast.diffusion import create_diffusion
from mdt_fast.diffusion.guidance import guide
from mdt_fast.kernels import cfg_step, ddim_coefficients, ddpm_coefficients
from mdt_fast.kernels.cfg_step import reference
from tolerances import FLOAT32, relative_error

pytestmark = pytest.mark.gpu

KINDS = pytest.mark.parametrize("kind", ["ddpm", "ddim"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, device="cuda").to(dtype)


def table(kind: str, steps: str = "10") -> Tensor:
    a = create_diffusion(steps).alphas_cumprod
    return (ddpm_coefficients(a) if kind == "ddpm" else ddim_coefficients(a, 0.5)).cuda()


@DTYPES
@KINDS
def test_each_step_of_a_loop(kind: str, dtype: torch.dtype) -> None:
    """Against the sampler's step from the same state; latents are float32, the model's output ``dtype``."""
    diffusion, rows, scale = create_diffusion("10"), table(kind), torch.tensor([3.8, 1.0], device="cuda")
    noise, outputs = randn(11, 4, 4, 32, 32), randn(10, 4, 8, 32, 32, dtype=dtype)
    step = diffusion.p_sample if kind == "ddpm" else diffusion.ddim_sample
    extra = {} if kind == "ddpm" else {"eta": 0.5}
    x = noise[10]
    for i in range(9, -1, -1):
        expected = step(
            lambda x, t, i=i: guide(*outputs[i].float().chunk(2), scale, channels=3),
            x,
            torch.full((4,), i, device="cuda"),
            clip_denoised=False,
            generator=lambda like, i=i: noise[i],
            **extra,
        )
        sample, xstart = cfg_step(outputs[i], x, noise[i], rows[i], scale=scale, kind=kind)
        x = expected["sample"]
        assert relative_error(sample, x) <= FLOAT32
        assert relative_error(xstart, expected["pred_xstart"]) <= FLOAT32


@KINDS
def test_nan_is_not_clipped_away(kind: str) -> None:
    output = randn(2, 8, 8, 8)
    output[0, 3, 1, 2] = torch.nan
    for result in cfg_step(
        output, randn(2, 4, 8, 8), None, table(kind)[5], scale=2.0, kind=kind, clip_denoised=True
    ):
        assert result[0, 3, 1, 2].isnan()
        assert result.isnan().sum() == 1


@pytest.mark.parametrize("guided", [False, True])
def test_more_samples_than_a_grid_is_high(guided: bool) -> None:
    B, row = 140_002, table("ddpm")[5]
    output, x, noise = randn(B, 4, 1, 1), randn(B, 2, 1, 1), randn(B, 2, 1, 1)
    scale = torch.full((B // 2,), 3.0, device="cuda") if guided else None
    ours = cfg_step(output, x, noise, row, scale=scale, guided_channels=1)
    exact = reference.cfg_step(
        output.double(), x.double(), noise.double(), row.expand(B, -1).double(), scale, 1, "ddpm", "epsilon",
        False,
    )  # fmt: skip
    for got, expected in zip(ours, exact, strict=True):
        assert relative_error(got, expected) <= FLOAT32


def test_half_latents() -> None:
    output, x, noise = (randn(4, c, 32, 32, dtype=torch.bfloat16) for c in (8, 4, 4))
    sample, _ = cfg_step(output, x, noise, table("ddpm")[5], scale=3.8)
    exact, _ = cfg_step(output.double(), x.double(), noise.double(), table("ddpm")[5], scale=3.8)
    assert sample.dtype == torch.bfloat16
    assert relative_error(sample, exact) <= torch.finfo(torch.bfloat16).eps


@KINDS
def test_under_inductor(kind: str) -> None:
    output, x, noise = randn(4, 8, 32, 32, dtype=torch.bfloat16), randn(4, 4, 32, 32), randn(4, 4, 32, 32)

    def step(output: Tensor, x: Tensor, noise: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
        return cfg_step(output, x, noise, row, scale=3.8, kind=kind)

    args = (output, x, noise, table(kind)[5])
    for ours, expected in zip(torch.compile(step, fullgraph=True)(*args), step(*args), strict=True):
        assert torch.equal(ours, expected)


def test_a_whole_loop_in_one_cuda_graph() -> None:
    """Ten steps with a stand-in for the model, replayed on new noise."""
    rows, start, noise = table("ddpm"), randn(4, 4, 32, 32), randn(10, 4, 4, 32, 32)

    def loop() -> Tensor:
        x = start
        for i in range(9, -1, -1):
            x, _ = cfg_step(torch.cat([x.sin(), x.cos()], dim=1), x, noise[i], rows[i], scale=3.8)
        return x

    loop()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = loop()
    for _ in range(2):
        noise.normal_()
        start.normal_()
        graph.replay()
        assert torch.equal(captured, loop())


def test_never_waits_for_the_device() -> None:
    args = (randn(4, 8, 32, 32), randn(4, 4, 32, 32), randn(4, 4, 32, 32), table("ddpm")[5])
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        cfg_step(*args, scale=3.8)
        cfg_step(*args)
    finally:
        torch.cuda.set_sync_debug_mode("default")
