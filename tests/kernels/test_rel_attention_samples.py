"""Attention on a CPU, a few samples at a time, against plain PyTorch: every gradient, in every layout."""

from functools import partial

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from mdt_fast.kernels import rel_attention, rel_attention_qkvpacked
from mdt_fast.kernels.rel_attention import backends, reference, samples
from mdt_fast.kernels.rel_attention.call import Call, Side
from parity import compare, run
from tolerances import FLOAT32, FLOAT64, relative_error

H, G = 3, 5
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def table() -> Tensor:
    return torch.randn((2 * G - 1) ** 2 + 3, H)


def positions(*lengths: int, ascending: bool = True) -> Tensor:
    ids = [torch.randperm(G * G)[:n] for n in lengths]
    return torch.cat([i.sort().values if ascending else i for i in ids])


def offsets_of(*lengths: int) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def plain(q: Tensor, k: Tensor, v: Tensor, table_RH: Tensor, call: Call) -> Tensor:
    return reference.rel_attention(q, k, v, table_RH, call)


def packed_plain(qkv: Tensor, table_RH: Tensor, pos: Tensor, offsets: Tensor, length: int) -> Tensor:
    side = Side(pos=pos, offsets=offsets, length=length, batch=len(offsets) - 1)
    call = Call(queries=side, keys=side, grid_size=G, scale=qkv.shape[-1] ** -0.5)
    return plain(*qkv.unbind(1), table_RH, call)


@pytest.fixture(params=[0, 1, 2], ids=["csrc", "one at a time", "two at a time"], autouse=True)
def _whose(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """By ``csrc/`` where it can serve, or by PyTorch with so many samples at a time."""
    if request.param:
        monkeypatch.setitem(samples.WITH_CPP, "rel_attention", 1000)
        monkeypatch.setattr(samples, "SCORES_BYTES", request.param * H * (G * G) ** 2 * 4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", [1, 64, 72])
@pytest.mark.parametrize("lengths", [(25, 25, 25, 10, 10, 7), (3,), (25, 0, 0, 1)], ids=str)
@pytest.mark.parametrize("ascending", [True, False], ids=["ascending", "shuffled"])
def test_packed_batches(dtype: torch.dtype, d: int, lengths: tuple[int, ...], ascending: bool) -> None:
    torch.manual_seed(0)
    pos, offsets = positions(*lengths, ascending=ascending), offsets_of(*lengths)
    ours = partial(rel_attention_qkvpacked, grid_size=G, pos=pos, offsets=offsets)
    oracle = partial(packed_plain, pos=pos, offsets=offsets, length=max(lengths))
    compare(ours, oracle, [torch.randn(sum(lengths), 3, H, d), table()], dtype)


def test_float64() -> None:
    lengths = (25, 11)
    pos, offsets = positions(*lengths), offsets_of(*lengths)
    args = [torch.randn(36, 3, H, 8).double(), table().double()]
    ours = run(partial(rel_attention_qkvpacked, grid_size=G, pos=pos, offsets=offsets), args)
    oracle = run(partial(packed_plain, pos=pos, offsets=offsets, length=25), args)
    for a, e in zip(ours, oracle, strict=True):
        assert relative_error(a, e) < FLOAT64


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("M", "N"), [(25, 25), (7, 25), (6, 9), (0, 4), (4, 0)], ids=str)
def test_queries_that_are_a_subset(dtype: torch.dtype, M: int, N: int) -> None:
    B, d = 2, 16
    torch.manual_seed(0)
    q_pos = None if M == G * G else positions(M, M).view(B, M)
    k_pos = None if N == G * G else positions(N, N).view(B, N)
    sides = [Side(pos=pos, offsets=None, length=n, batch=B) for pos, n in ((q_pos, M), (k_pos, N))]
    call = Call(queries=sides[0], keys=sides[1], grid_size=G, scale=d**-0.5)
    ours = partial(rel_attention, grid_size=G, q_pos=q_pos, k_pos=k_pos)
    args = [torch.randn(B, H, n, d) for n in (M, N, N)] + [table()]
    compare(ours, partial(plain, call=call), args, dtype)


def test_it_serves_what_needs_it_and_all_where_csrc_does() -> None:
    q, side = torch.randn(1, H, 25, 8), Side(pos=None, offsets=None, length=25, batch=1)
    call = Call(queries=side, keys=side, grid_size=G, scale=1.0)
    assert backends.choose("auto", q, table().requires_grad_(), call, True) == "samples"
    others = "samples" if samples.by_csrc(q) else "sdpa"
    assert backends.choose("auto", q, table(), call, True) == others
    assert backends.choose("auto", q, table().requires_grad_(), call, False) == others
    with pytest.raises(ValueError, match="'samples' cannot serve this call: it serves the CPU; got meta"):
        backends.choose("samples", q.to("meta"), None, call, False)


def test_compiled_with_every_length() -> None:
    """One graph serves all numbers of kept tokens."""
    torch._dynamo.reset()
    graphs = 0

    def count(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        nonlocal graphs
        graphs += 1
        return graph

    @partial(torch.compile, backend=count, fullgraph=True)
    def attend(qkv: Tensor, weights: Tensor, pos: Tensor, offsets: Tensor) -> Tensor:
        return rel_attention_qkvpacked(qkv, weights, grid_size=G, pos=pos, offsets=offsets, max_length=G * G)

    weights = table().requires_grad_()
    for kept in (9, 10, 17, 3):
        qkv = torch.randn(25 + kept, 3, H, 8)
        pos, offsets = positions(25, kept), offsets_of(25, kept)
        torch._dynamo.mark_dynamic(qkv, 0)
        torch._dynamo.mark_dynamic(pos, 0)
        expected = rel_attention_qkvpacked(qkv, weights, grid_size=G, pos=pos, offsets=offsets)
        assert torch.equal(attend(qkv, weights, pos, offsets), expected)
    assert graphs == 1


@pytest.mark.parametrize("needs_grad", [False, True], ids=["no gradient", "gradients"])
@pytest.mark.parametrize("with_table", [False, True], ids=["no table", "table"])
def test_compiled_whole_grids(with_table: bool, needs_grad: bool) -> None:
    """Which implementation serves depends on the processor, which is asked while compiling."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    qkv = torch.randn(2, 64, 3, H, 8, requires_grad=needs_grad)
    weights = torch.randn(15 * 15 + 3, H) if with_table else None
    compiled = torch.compile(rel_attention_qkvpacked, fullgraph=True, backend="aot_eager")
    results = [f(qkv, weights, grid_size=8) for f in (compiled, rel_attention_qkvpacked)]
    assert torch.equal(*results)
    if needs_grad:
        assert torch.equal(*(torch.autograd.grad(out.sum(), qkv)[0] for out in results))


def test_empty_heads_lie_anyhow() -> None:
    nothing = torch.randn(0, H, 8, 64).mT
    assert rel_attention(*[nothing] * 3, attention_backend="samples").shape == (0, H, 64, 8)
    q, k = torch.randn(2, H, 5, 8), torch.randn(2, H, 16, 7).mT[:, :, :0, ::2]
    out, *gradients = run(partial(rel_attention, attention_backend="samples"), [q, k, k])
    assert not out.any()
    assert [g.shape for g in gradients] == [q.shape, k.shape, k.shape]
    leaf = k.detach().requires_grad_()
    assert not rel_attention(q, leaf, leaf, attention_backend="samples").any()


def test_positions_whatever_the_default_device() -> None:
    qkv, weights, pos = torch.randn(2, 10, 3, H, 8), table(), positions(10, 10).view(2, 10)
    expected = rel_attention_qkvpacked(qkv, weights, grid_size=G, pos=pos, attention_backend="samples")
    with torch.device("meta"):
        actual = rel_attention_qkvpacked(qkv, weights, grid_size=G, pos=pos, attention_backend="samples")
        in_double = rel_attention_qkvpacked(
            qkv.double(), weights.double(), grid_size=G, pos=pos, attention_backend="samples"
        )
    assert torch.equal(actual, expected)
    assert relative_error(actual, in_double) < FLOAT32


def test_forward_mode_gradients_are_refused() -> None:
    """Otherwise they would be silently missing."""
    qkv = torch.randn(2, 25, 3, H, 8)
    with forward_ad.dual_level(), pytest.raises(ValueError, match="'samples' cannot serve this call"):
        rel_attention_qkvpacked(forward_ad.make_dual(qkv, qkv), attention_backend="samples")


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_of_the_table_whatever_the_default_dtype(default: torch.dtype, dtype: torch.dtype) -> None:
    q, k, v = torch.randn(3, 1, 2, 4, 8, dtype=torch.float32)
    table = torch.randn(12, 2, dtype=torch.float32).to(dtype)

    def gradient() -> Tensor:
        leaf = table.clone().requires_grad_()
        out = rel_attention(q, k, v, leaf, grid_size=2, attention_backend="samples")
        return torch.autograd.grad(out.square().sum(), leaf)[0]

    expected = gradient()
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(default)
        assert torch.equal(gradient(), expected)
    finally:
        torch.set_default_dtype(before)
