"""The optimisers on CUDA: against PyTorch in float64, no waiting, CUDA graphs, many and unaligned tensors."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fused import BOTH, assert_near, bits, same, set_grads
from mdt_fast.kernels import grad_norm, grad_sumsq, native
from mdt_fast.kernels.optim import op

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not native.library("cuda"), reason=f"csrc: {native.MISSING['cuda']}"),
]

SHAPES = [(7, 5), (3,), (), (0, 4), (1,), (1301, 17), (2, 3, 4), (1152, 1152), (40_000,)]


def parameters(dtype: torch.dtype, shapes: list[tuple[int, ...]] = SHAPES) -> list[nn.Parameter]:
    draw = torch.Generator().manual_seed(1)
    return [nn.Parameter(torch.randn(shape, generator=draw).to("cuda", dtype)) for shape in shapes]


def on_gpu(params: list[nn.Parameter], step: int) -> None:
    draw = torch.Generator("cuda").manual_seed(100 + step)
    for p in params:
        p.grad = torch.randn(p.shape, generator=draw, device="cuda").to(p.dtype)


def steps(cls: Any, params: list[nn.Parameter], count: int, **options: Any) -> Any:
    optimizer = cls(params, lr=1e-2, weight_decay=0.1, max_grad_norm=1.0, **options)
    optimizer.add_ema([p.detach().clone().float() for p in params], 0.9)
    for step in range(count):
        on_gpu(params, step)
        optimizer.step()
    return optimizer


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_twenty_steps_against_float64(cls: Any, dtype: torch.dtype) -> None:
    params = parameters(dtype)
    exact = [nn.Parameter(p.detach().double()) for p in params]
    ours = cls(params, lr=1e-2, weight_decay=0.1, max_grad_norm=1.0)
    theirs = cls(exact, lr=1e-2, weight_decay=0.1, max_grad_norm=1.0)
    averages = [[p.detach().clone().float() for p in params], [p.detach().clone() for p in exact]]
    ours.add_ema(averages[0], 0.9)
    theirs.add_ema(averages[1], 0.9)
    for step in range(20):
        on_gpu(params, step)
        for p, q in zip(params, exact):
            q.grad = p.grad.double()
        ours.step()
        theirs.step()
    weights = [ours.state[p].get("master", p) for p in params]
    assert_near(weights + averages[0], exact + averages[1], 1e-4)
    assert ours.grad_norm.item() == pytest.approx(theirs.grad_norm.item(), rel=1e-5)
    if dtype == torch.bfloat16:
        assert all(torch.equal(p, w.bfloat16()) for p, w in zip(params, weights))


@BOTH
def test_two_runs_give_the_same_bits_with_bfloat16_moments_too(cls: Any) -> None:
    for dtype in (None, torch.bfloat16):
        runs = []
        for _ in range(2):
            params = parameters(torch.float32)
            runs.append(bits(steps(cls, params, 5, moments_dtype=dtype), params))
        assert same(*runs)


@BOTH
def test_the_cpu_and_cuda_ops_agree(cls: Any) -> None:
    gpu = parameters(torch.float32)
    cpu = [nn.Parameter(p.detach().cpu()) for p in gpu]
    ours, theirs = (cls(p, lr=1e-2, moments_dtype=torch.bfloat16) for p in (gpu, cpu))
    for step in range(10):
        set_grads(cpu, step)
        for p, q in zip(gpu, cpu):
            p.grad = q.grad.cuda()
        ours.step()
        theirs.step()
    assert_near([p.cpu() for p in gpu], cpu, 2e-3)


@BOTH
def test_thousands_of_tensors_and_unaligned_ones(cls: Any) -> None:
    base = torch.randn(3000 * 33, device="cuda")
    params = [nn.Parameter(base[33 * i : 33 * i + 33]) for i in range(3000)]  # 33 floats: mostly unaligned
    exact = [nn.Parameter(p.detach().double()) for p in params]
    ours, theirs = cls(params, lr=1e-2), cls(exact, lr=1e-2)
    for step in range(3):
        on_gpu(params, step)
        for p, q in zip(params, exact):
            q.grad = p.grad.double()
        ours.step()
        theirs.step()
    assert_near(params, exact, 1e-5)


@BOTH
def test_a_gradient_that_is_not_finite_changes_nothing(cls: Any) -> None:
    params = parameters(torch.float32)
    optimizer = steps(cls, params, 2)
    before = bits(optimizer, params)
    on_gpu(params, 5)
    params[5].grad[1000, 3] = float("nan")
    optimizer.step()
    assert same(before, bits(optimizer, params))
    assert optimizer.skipped_steps == 1


@BOTH
def test_never_waits_for_the_device(cls: Any) -> None:
    params = parameters(torch.float32)
    optimizer = steps(cls, params, 2)
    on_gpu(params, 3)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@BOTH
def test_in_a_cuda_graph(cls: Any) -> None:
    """Replayed steps act like ordinary ones: counts advance, and a rate in a tensor is read anew."""
    runs = []
    for captured in (False, True):
        params = parameters(torch.float32)
        lr = torch.tensor(1e-2, device="cuda")
        optimizer = cls(params, lr=lr, max_grad_norm=1.0)
        on_gpu(params, 0)
        optimizer.step()
        grads: list[Tensor] = [p.grad for p in params]
        graph = torch.cuda.CUDAGraph()
        if captured:
            torch.cuda.synchronize()
            with torch.cuda.graph(graph):
                optimizer.step()
        for step in range(1, 5):
            lr.fill_(1e-2 / step)
            draw = torch.Generator("cuda").manual_seed(step)
            for grad in grads:
                grad.copy_(torch.randn(grad.shape, generator=draw, device="cuda"))
            graph.replay() if captured else optimizer.step()
        torch.cuda.synchronize()
        runs.append([p.detach().clone() for p in params])
    assert same(*runs)


def test_the_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    grads = [torch.randn(shape, device="cuda") for shape in SHAPES]
    grads += [g.bfloat16() for g in grads]
    exact = sum(float(g.double().square().sum()) for g in grads)
    assert grad_sumsq(grads).item() == pytest.approx(exact, rel=1e-6)
    assert torch.equal(grad_sumsq(grads), grad_sumsq(grads))
    assert grad_norm([*grads, torch.tensor([float("inf")], device="cuda")]).isinf()
    ours = grad_norm(grads).item()
    monkeypatch.setattr(op, "library", lambda device: False)
    assert grad_norm(grads).item() == pytest.approx(ours, rel=1e-6)


@BOTH
def test_on_another_stream(cls: Any) -> None:
    expected, params = parameters(torch.float32), parameters(torch.float32)
    steps(cls, expected, 3)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        steps(cls, params, 3)
    side.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(params, expected))
