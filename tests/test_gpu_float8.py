"""Products in float8 on a GPU: rounded to the same bits as by PyTorch, then products and their gradients."""

import copy
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import mdt_fast
from float8 import FUSED, exact_linear, spread
from mdt_fast import (
    DiffusionConfig,
    FusedAdan,
    SampleConfig,
    SampleSwitches,
    TrainingStep,
    create_diffusion,
    kernels,
    use_float8,
)
from mdt_fast.kernels.float8 import reference
from mdt_fast.kernels.float8.registered import multiplies, multiply
from parity import run
from small_models import made
from tolerances import relative_error

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        torch.cuda.is_available() and not multiplies(torch.device("cuda")),
        reason="this GPU has no products in float8",
    ),
]
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)


@pytest.mark.parametrize(
    ("D", "outputs"), [(16, 16), (16, 32), (32, 16), (1152, 3456), (4608, 1152)], ids=str
)
@pytest.mark.parametrize("R", [1, 3, 21, 33, 1000, 13088])
def test_the_products_shapes(R: int, D: int, outputs: int) -> None:
    """Shapes that PyTorch multiplies with a scale per row: any number of rows, with and without a bias."""
    x, weight, bias = torch.randn(R, D).cuda(), torch.randn(outputs, D).cuda(), torch.randn(outputs).cuda()
    operands = *kernels.quantize_rows(x), *kernels.quantize_weight(weight)[::2]
    for b in (None, bias.bfloat16()):
        ours, plain = (f(*operands, b, torch.bfloat16) for f in (multiply, reference.multiply))
        assert relative_error(ours, plain) <= 2**-6


@DTYPES
@pytest.mark.parametrize(("R", "D"), [(1, 1), (70, 300), (333, 1152), (64, 4608), (0, 16)], ids=str)
def test_the_same_bits_as_the_reference(R: int, D: int, dtype: torch.dtype) -> None:
    x = spread(R, D).to("cuda", dtype)
    for factor in (None, torch.exp2(torch.randint(-9, 9, (D,), device="cuda").float())):
        ours = kernels.quantize_rows(x, factor=factor)
        for a, e in zip(ours, reference.quantize_rows(x, None, factor), strict=True):
            assert torch.equal(a.float(), e.float())
    if R:
        for a, e in zip(kernels.quantize_weight(x), reference.quantize_weight(x, True)[:3], strict=True):
            assert torch.equal(a.float(), e.float())


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_what_is_not_finite_is_never_hidden(bad: float) -> None:
    x, weight = torch.randn(3, 32, device="cuda"), torch.randn(16, 32, device="cuda")
    x[1, 5] = bad
    out = kernels.linear(x, weight, float8=True)
    assert out[1].isnan().all()
    assert out[[0, 2]].isfinite().all()


@DTYPES
@pytest.mark.parametrize(
    ("R", "D", "outputs"), [(1, 16, 16), (33, 1152, 3456), (1000, 4608, 1152), (0, 16, 32)], ids=str
)
def test_linear(R: int, D: int, outputs: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, weight, bias, dout = (
        torch.randn(shape, device="cuda").to(dtype)
        for shape in ((R, D), (outputs, D), (outputs,), (R, outputs))
    )
    leaves = [a.clone().requires_grad_() for a in (x, weight, bias)]
    out = kernels.linear(*leaves, float8=True)
    ours = [out, *torch.autograd.grad(out, leaves, dout)]
    again = torch.autograd.grad(kernels.linear(*leaves, float8=True), leaves, dout)
    assert all(torch.equal(a, b) for a, b in zip(ours[1:], again, strict=True))
    for a, e in zip(ours, exact_linear(x, weight, bias, dout), strict=True):
        assert a.dtype == dtype
        assert relative_error(a, e) <= 2**-6  # rounded to bfloat16; Hopper sums in 14 bits


@pytest.mark.parametrize("D", [16, 80, 1152])
@pytest.mark.parametrize("name", FUSED)
def test_layers_behind_others(name: str, D: int) -> None:
    """The parts round to bfloat16 in between, which moves one float8 number in thirty to its neighbour."""
    torch.manual_seed(0)
    fused, parts, args = FUSED[name](D)
    args = [a.to("cuda", torch.bfloat16) for a in args]
    ours, again = (run(partial(fused, float8=True), args) for _ in range(2))
    theirs, unrounded = run(partial(parts, float8=True), args), run(parts, args)
    for a, b, e, u in zip(ours, again, theirs, unrounded, strict=True):
        assert torch.equal(a, b)
        assert (a - e).norm() <= 3e-2 * e.norm()
        assert (a - u).norm() <= 0.06 * u.norm()


def model(**settings: Any) -> Any:
    """A model whose weights make every layer count."""
    return made("mdtv2", torch.float32, mask_ratio=0.3, std=0.05, hidden_size=64, **settings).cuda()


def gradients(trained: Any, **settings: Any) -> list[Tensor]:
    torch.manual_seed(0)
    x, y = torch.randn(8, 4, 8, 8, device="cuda"), torch.arange(8, device="cuda")
    step = TrainingStep(trained, create_diffusion(), dtype="bfloat16", **settings)
    for i in range(2):  # captured in the first, replayed in the second
        torch.manual_seed(i)
        step(x, y)
    return [p.grad.clone() for p in trained.parameters() if p.grad is not None]


def test_a_training_step() -> None:
    """Near its emulation by plain products; a graph gives the same bits as eager code."""
    plain = model().train()
    converted, emulated = copy.deepcopy(plain), copy.deepcopy(plain).cpu()
    assert use_float8(converted) > 0
    use_float8(emulated, emulate=True)
    exact, rounded = gradients(plain, cuda_graphs=False), gradients(converted, cuda_graphs=False)
    for each, eager in ((plain, exact), (converted, rounded)):
        graphed = gradients(copy.deepcopy(each), cuda_graphs=True)
        assert all(torch.equal(a, b) for a, b in zip(eager, graphed, strict=True))
    of_all = [torch.cat([g.flatten() for g in some]) for some in (exact, rounded)]
    assert 1e-3 < (of_all[1] - of_all[0]).norm() / of_all[0].norm() < 0.1
    x, t, y = torch.randn(4, 4, 8, 8), torch.arange(4) * 90, torch.arange(4)
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16), torch.autocast("cpu", torch.bfloat16):
        ours, theirs = converted.eval()(x.cuda(), t.cuda(), y.cuda()).cpu(), emulated.eval()(x, t, y)
    assert (ours - theirs).norm() < 0.03 * theirs.norm()


def test_it_learns() -> None:
    losses = []
    for convert in (False, True):
        torch.manual_seed(0)
        trained = model().train()
        if convert:
            use_float8(trained)
        optimizer = FusedAdan(trained.named_parameters(), lr=1e-3)
        step, found = TrainingStep(trained, create_diffusion(), dtype="bfloat16"), []
        x, y = torch.randn(16, 4, 8, 8, device="cuda") * 0.5, torch.arange(16, device="cuda") % 10
        for i in range(60):
            torch.manual_seed(i)
            found.append(step(x, y)["loss"].mean().item())
            optimizer.step()
        losses.append(torch.tensor(found))
    exact, rounded = losses
    assert exact[-20:].mean() < 0.9 * exact[:10].mean()
    assert (rounded[-20:].mean() / exact[-20:].mean() - 1).abs() < 0.05


@pytest.mark.parametrize("by", ["ddim", "ddpm"])
def test_sampling(by: Any) -> None:
    plain = model().eval()
    converted = copy.deepcopy(plain)
    use_float8(converted)
    config = SampleConfig(num_samples=3, steps=6, sampler=by, cfg_scale=2.0, dtype="bfloat16")
    draws = partial(mdt_fast.sample, diffusion=DiffusionConfig(), labels=[1, 2, 3], config=config)
    ours, stepwise = draws(converted), draws(converted, switches=SampleSwitches.none())
    exact = draws(plain)
    assert (ours - stepwise).norm() < 0.05 * exact.norm()
    assert 0 < (ours - exact).norm() < 0.15 * exact.norm()


def test_compiled_by_blocks() -> None:
    """Last, because compiling takes a minute."""
    converted = model().train()
    use_float8(converted)
    compiled = copy.deepcopy(converted)
    mdt_fast.compile_for_training(compiled)
    eager, inductors = (
        torch.cat([g.flatten() for g in gradients(each, cuda_graphs=False)]) for each in (converted, compiled)
    )
    assert (inductors - eager).norm() < 0.05 * eager.norm()
