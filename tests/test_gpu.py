"""What only a GPU shows: compiled kernels, bfloat16, no waiting for the device, the same bits twice.

Half types follow the rule of ``tolerances.py``: against plain PyTorch in the same dtype.
"""

import copy
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch._functorch.config as functorch_config
import torch.nn.functional as F
from torch import Tensor, nn

from mdt_fast import MaskPlan, SampleConfig, from_reference, kernels, reference, sample
from mdt_fast.diffusion import create_diffusion
from mdt_fast.kernels.backends import IN_FLOAT8, WITH_TRITON, backends
from mdt_fast.kernels.bias_gelu import reference as plain_gelu
from mdt_fast.kernels.float8.registered import multiplies
from mdt_fast.kernels.ln_modulate import reference as plain_ln
from mdt_fast.kernels.skip_linear import reference as plain_skip
from mdt_fast.kernels.tokens import reference as plain_tokens
from parity import compare, run
from tolerances import FLOAT32, HALF_FACTOR, relative_error

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("full_float32")]

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)


@DTYPES
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize(
    ("B", "L", "D"), [(1, 1, 8), (3, 153, 72), (4, 256, 384), (2, 179, 1152), (2, 9, 8192)]
)
def test_ln_modulate(B: int, L: int, D: int, gated: bool, dtype: torch.dtype) -> None:
    x, m = torch.randn(2, B, L, D, device="cuda"), torch.randn(B, 3 * D, device="cuda").chunk(3, dim=1)
    args = [a.to(dtype) for a in ([*x, *m] if gated else [x[0], *m[1:]])]
    name = "gate_residual_ln_modulate" if gated else "ln_modulate"
    compare(getattr(kernels, name), partial(getattr(plain_ln, name), offsets=None, eps=1e-6), args, dtype)


@DTYPES
@pytest.mark.parametrize("shape", [(1, 8), (153, 288), (4, 256, 4608)], ids=str)
def test_bias_gelu(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    args = [
        a.to(dtype) for a in (3 * torch.randn(shape, device="cuda"), torch.randn(shape[-1], device="cuda"))
    ]
    compare(kernels.bias_gelu, plain_gelu.bias_gelu, args, dtype)


@DTYPES
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize(("B", "L", "D"), [(1, 1, 8), (3, 153, 72), (4, 256, 384), (0, 9, 8)])
def test_gelu_in_the_product(
    B: int, L: int, D: int, compiled: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without gradients, GELU is the product's epilogue, no less exact than after the product."""
    torch.manual_seed(0)
    seen, epilogue = [], torch._addmm_activation
    if compiled:
        torch._dynamo.reset()  # all cases are recompilations of one function, of which eight are allowed
    else:
        monkeypatch.setattr(
            torch, "_addmm_activation", lambda *a, **k: seen.append(dtype) or epilogue(*a, **k)
        )
    x, m = torch.randn(2, B, L, D, device="cuda"), torch.randn(B, 3 * D, device="cuda").chunk(3, dim=1)
    layer = torch.randn(4 * D, D, device="cuda") * D**-0.5, torch.randn(4 * D, device="cuda")
    args = [a.to(dtype) for a in (*x, *m, *layer)]

    def plain(x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, *layer: Tensor) -> Tensor:
        normal = plain_ln.gate_residual_ln_modulate(x, y, gate, shift, scale, None, 1e-6)[1]
        return F.gelu(F.linear(normal, *layer), approximate="tanh")

    op = partial(kernels.gate_residual_ln_modulate_linear, gelu=True)
    with torch.no_grad():
        ours = (torch.compile(op, fullgraph=True) if compiled else op)(*args)[1]
    exact = plain(*(a.double() for a in args))
    assert (ours.dtype, ours.shape) == (dtype, exact.shape)
    assert bool(seen) == (not compiled and dtype != torch.float32 and B > 0)
    if ours.numel():
        allowed = FLOAT32 if dtype == torch.float32 else HALF_FACTOR * relative_error(plain(*args), exact)
        assert relative_error(ours, exact) <= allowed


@DTYPES
@pytest.mark.parametrize(("R", "D"), [(1, 8), (129, 300), (13088, 3456), (64, 6912)])
def test_sum_rows(R: int, D: int, dtype: torch.dtype) -> None:
    compare(kernels.sum_rows, lambda x: x.sum(0), [torch.randn(R, D, device="cuda").to(dtype)], dtype)


def gelu_linear(x: Tensor, bias: Tensor, *layer: Tensor) -> Tensor:
    return F.linear(plain_gelu.bias_gelu(x, bias), *layer)


@pytest.fixture
def own_graphs() -> Iterator[None]:
    """No cached graphs from elsewhere: in torch 2.11 they do not record autocast's dtype."""
    torch._dynamo.reset()
    with functorch_config.patch(enable_autograd_cache=False):
        yield


LAYERS = {
    "linear": (kernels.linear, F.linear, 0),
    "skip_linear": (kernels.skip_linear, plain_skip.skip_linear, 1),
    "gelu_linear": (kernels.gelu_linear, gelu_linear, 2),
    "residual_ln_modulate_linear": (
        kernels.residual_ln_modulate_linear,
        lambda x, shift, scale, *layer: (
            x, F.linear(plain_ln.ln_modulate(x, shift, scale, None, 1e-6), *layer)
        ),
        3,
    ),
}  # fmt: skip


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_layers_under_autocast(name: str, dtype: torch.dtype, compiled: bool, own_graphs: None) -> None:
    """The gradients of float32 parameters are float32, from products that are not rounded on the way."""
    op, plain, form = LAYERS[name]
    B, L, D = 2, 153, 72
    before = [[], [(B, L, D)], [(D,)], [(B, D), (B, D)]][form]
    inputs = 2 * D if form == 1 else D
    shapes = [(B, L, D), *before, (40, inputs), (40,)]
    args = [torch.randn(shape, device="cuda") * (0.1 if shape == (40, inputs) else 1) for shape in shapes]
    ours = torch.compile(op) if compiled else op

    def cast(f: Any) -> Any:
        def call(*leaves: Tensor) -> Any:
            with torch.autocast("cuda", dtype):
                return f(*leaves)

        return call

    exact = run(plain, [a.double() for a in args])
    results = zip(run(cast(ours), args), run(cast(plain), args), exact, strict=True)
    for i, (a, p, e) in enumerate(results):
        assert a.dtype == p.dtype, f"result {i}"
        assert relative_error(a, e) <= HALF_FACTOR * max(relative_error(p, e), torch.finfo(dtype).eps), (
            f"result {i}"
        )


@DTYPES
@pytest.mark.parametrize(("B", "L", "K", "D"), [(1, 1, 1, 8), (3, 64, 0, 72), (4, 256, 153, 1152)])
def test_unmask_tokens(B: int, L: int, K: int, D: int, dtype: torch.dtype) -> None:
    plan = {"ids_restore_BL": MaskPlan.from_noise(torch.rand(B, L, device="cuda"), K).ids_restore}
    args = [torch.randn(shape, device="cuda").to(dtype) for shape in ((B, K, D), (1, 1, D), (1, L, D))]
    op, plain = (partial(f, **plan) for f in (kernels.unmask_tokens, plain_tokens.unmask_tokens))
    compare(op, plain, args, dtype)


def models(dtype: torch.dtype, **shape: int) -> tuple[nn.Module, nn.Module]:
    oracle = reference.MDTv2(input_size=32, depth=4, num_classes=10, mask_ratio=0.3, decode_layer=2, **shape)
    for parameter in oracle.parameters():
        nn.init.normal_(parameter, std=0.05)
    oracle = oracle.cuda().to(dtype).train()
    return oracle, from_reference(oracle)


def batch(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(4, 4, 32, 32, device="cuda", dtype=dtype)
    return x, torch.randint(0, 1000, (4,), device="cuda"), torch.randint(0, 10, (4,), device="cuda")


@DTYPES
@pytest.mark.parametrize("shape", [(128, 2), (144, 2)], ids=["head 64", "head 72"])
@pytest.mark.parametrize("len_keep", [None, 153])
def test_model(len_keep: int | None, shape: tuple[int, int], dtype: torch.dtype) -> None:
    oracle, fast = models(torch.float32, hidden_size=shape[0], num_heads=shape[1])
    oracle.eval(), fast.eval()
    x, t, y = batch(torch.float32)
    plan = (
        {}
        if len_keep is None
        else {"mask_plan": MaskPlan.from_noise(torch.rand(4, 256, device="cuda"), len_keep)}
    )
    expected = oracle(x, t, y, **plan)
    with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
        ours, plain = fast(x, t, y, **plan), oracle(x, t, y, **plan)
    allowed = FLOAT32 if dtype == torch.float32 else HALF_FACTOR * relative_error(plain, expected)
    assert relative_error(ours, expected) <= allowed


def test_a_training_step_never_waits_for_the_device() -> None:
    _, fast = models(torch.float32, hidden_size=128, num_heads=2)
    diffusion = create_diffusion()
    diffusion.to("cuda")
    x, t, y = batch(torch.float32)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for kwargs in ({"y": y}, {"y": y, "enable_mask": True}):
            diffusion.training_losses(fast, x, t, kwargs)["loss"].mean().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_same_seed_gives_the_same_bits() -> None:
    _, fast = models(torch.bfloat16, hidden_size=144, num_heads=2)
    x, t, y = batch(torch.bfloat16)
    runs = []
    for _ in range(2):
        torch.manual_seed(0)
        fast.zero_grad()
        out = fast(x, t, y, enable_mask=True)
        out.float().square().mean().backward()
        runs.append([out.detach(), *(p.grad.clone() for p in fast.parameters() if p.grad is not None)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_on_another_gpu_than_the_current_one() -> None:
    """Forward and backward, eager and compiled; then a sampler's guided steps, with graphs."""
    _, fast = models(torch.float32, hidden_size=128, num_heads=2)
    fast.eval()  # no labels are dropped
    x, t, y = batch(torch.float32)
    expected = fast(x, t, y)
    expected.square().mean().backward()
    there = copy.deepcopy(fast).to("cuda:1")
    there.zero_grad()
    assert torch.cuda.current_device() == 0
    elsewhere = [tensor.to("cuda:1") for tensor in (x, t, y)]
    out = there(*elsewhere)
    out.square().mean().backward()
    assert relative_error(out.cpu(), expected.detach().cpu()) <= FLOAT32
    for ours, theirs in zip(there.parameters(), fast.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None)
        if ours.grad is not None and theirs.grad is not None and theirs.grad.norm() > 1e-6:
            assert relative_error(ours.grad.cpu(), theirs.grad.cpu()) <= 10 * FLOAT32
    compiled = torch.compile(there)(*elsewhere)
    assert relative_error(compiled.detach().cpu(), expected.detach().cpu()) <= FLOAT32
    how = SampleConfig(steps=3, cfg_scale=2.0, batch_size=2)
    pictures = [sample(m, create_diffusion("3"), [1, 2], how).cpu() for m in (there, fast)]
    assert relative_error(*pictures) <= 10 * FLOAT32


def test_triton_serves_its_ops() -> None:
    serving = {row.op: row.backend for row in backends()}
    there = [op for op in WITH_TRITON if op not in IN_FLOAT8 or multiplies(torch.device("cuda", 0))]
    assert all(serving[op] == "triton" for op in there)
