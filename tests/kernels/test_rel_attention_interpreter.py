"""``rel_attention``'s Triton kernels in Triton's interpreter (``TRITON_INTERPRET=1``; ``make test`` does).

Forward and every gradient against float64, in float32 and float16: head sizes 16 to 128, lengths that are no
multiple of a tile, kept tokens, queries apart from keys, samples of different lengths, both forms of the bias
and of the table's gradient. B samples, H heads, M queries, N keys, d head size, G grid side.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from mdt_fast.kernels import rel_attention, rel_attention_qkvpacked
from mdt_fast.kernels.backends import INTERPRETING
from parity import compare, poisoned, run, same
from tolerances import FLOAT32, relative_error

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.skipif(not INTERPRETING, reason="needs TRITON_INTERPRET=1 in the environment"),
]

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
WAYS = pytest.mark.parametrize(("bias_form", "table_grad"), [("lookup", "store"), ("dense", "recompute")])
TABLE = pytest.mark.parametrize("table_grad", ["recompute", "store"])
# The reference is plain PyTorch, chosen by name, so that errors are the op's own.
plain = partial(rel_attention, attention_backend="sdpa")


@pytest.fixture(autouse=True)
def _poison(monkeypatch: pytest.MonkeyPatch) -> Any:
    with poisoned(monkeypatch):
        yield


def heads(B: int, H: int, M: int, N: int, d: int, G: int | None) -> list[Tensor]:
    torch.manual_seed(B + 7 * M + 31 * N + 101 * d)
    shapes = [(B, H, M, d), (B, H, N, d), (B, H, N, d)]
    return [torch.randn(s) for s in shapes] + ([] if G is None else [torch.randn((2 * G - 1) ** 2 + 3, H)])


def kept(B: int, G: int, length: int) -> Tensor:
    return torch.rand(B, G * G).argsort(1)[:, :length]


def against_plain(
    args: list[Tensor], dtype: torch.dtype, how: dict[str, str] | None = None, **places: Any
) -> None:
    compare(partial(rel_attention, **(how or {}), **places), partial(plain, **places), args, dtype)


@DTYPES
@pytest.mark.parametrize("d", [16, 24, 32, 64, 72, 80, 96, 128])
def test_head_sizes(d: int, dtype: torch.dtype) -> None:
    against_plain(heads(2, 2, 36, 36, d, 6), dtype, grid_size=6)


@DTYPES
@pytest.mark.parametrize("d", [1, 8, 17, 70, 100])
def test_head_sizes_that_do_not_divide_by_eight(d: int, dtype: torch.dtype) -> None:
    """Half types pad them with zeros."""
    against_plain(heads(1, 2, 25, 25, d, 5), dtype, grid_size=5)


@DTYPES
@pytest.mark.parametrize("begin", [1, 4, 8])
def test_rows_that_begin_anywhere(begin: int, dtype: torch.dtype) -> None:
    """Heads cut out of wider rows, the output's gradient out of a longer tensor: half types copy what is not
    aligned to 16 bytes."""

    def op(*args: Tensor, **how: Any) -> Tensor:
        q, k, v = (x[..., begin : begin + 24] for x in args[:3])
        out = rel_attention(q, k, v, args[3], grid_size=5, **how)
        return torch.cat([out.new_zeros(begin), out.transpose(1, 2).flatten()])[begin:]

    compare(op, partial(op, attention_backend="sdpa"), heads(2, 2, 25, 25, 35, 5), dtype)


@DTYPES
@WAYS
@pytest.mark.parametrize("length", [None, 1, 40, 64, 81])
def test_kept_tokens(length: int | None, bias_form: str, table_grad: str, dtype: torch.dtype) -> None:
    """All tokens, one, a length that is no multiple of a tile, exactly one tile, and all by position."""
    G = 9
    n = length or G * G
    pos = None if length is None else kept(3, G, n)
    how = {"bias_form": bias_form, "table_grad": table_grad}
    args = heads(3, 2, n, n, 24, G)
    # With one token, the key's gradient is zero: softmax over one key is 1 whatever its score.
    if length == 1:
        op = partial(rel_attention, **how, grid_size=G, q_pos=pos, k_pos=pos)
        out, dq, dk, _, dtable = run(op, args)
        assert torch.equal(out, args[2])
        assert all(x.abs().max() < 1e-5 for x in (dq, dk, dtable))
        return
    against_plain(args, dtype, how, grid_size=G, q_pos=pos, k_pos=pos)


@DTYPES
@TABLE
@pytest.mark.parametrize(("M", "N"), [(30, 81), (81, 7), (1, 33)])
def test_queries_apart_from_keys(M: int, N: int, table_grad: str, dtype: torch.dtype) -> None:
    G = 9
    places = {
        "q_pos": kept(2, G, M) if M != G * G else None,
        "k_pos": kept(2, G, N) if N != G * G else None,
    }
    against_plain(heads(2, 2, M, N, 40, G), dtype, {"table_grad": table_grad}, grid_size=G, **places)


@DTYPES
@TABLE
@pytest.mark.parametrize("lengths", [[5, 36, 20], [0, 7, 0], [36]], ids=str)
def test_samples_of_different_lengths(lengths: list[int], table_grad: str, dtype: torch.dtype) -> None:
    G, H, d, R = 6, 2, 24, sum(lengths)
    offsets = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    pos = torch.cat([kept(1, G, n)[0].sort().values for n in lengths])
    args = [x[0].transpose(0, 1) for x in heads(1, H, R, R, d, None)] + [torch.randn((2 * G - 1) ** 2 + 3, H)]
    places = {"grid_size": G, "q_pos": pos, "k_pos": pos, "q_offsets": offsets}
    against_plain(args, dtype, {"table_grad": table_grad}, **places)


def test_ragged_queries_apart_from_ragged_keys() -> None:
    G, q_offsets, k_offsets = 6, torch.tensor([0, 3, 9]).int(), torch.tensor([0, 30, 36]).int()
    q_pos = torch.cat([kept(1, G, 3)[0], kept(1, G, 6)[0]])
    k_pos = torch.cat([kept(1, G, 30)[0], kept(1, G, 6)[0]])
    args = [torch.randn(n, 2, 16) for n in (9, 36, 36)] + [torch.randn(124, 2)]
    places = {"q_pos": q_pos, "k_pos": k_pos, "q_offsets": q_offsets, "k_offsets": k_offsets}
    against_plain(args, torch.float32, None, grid_size=G, **places)


@DTYPES
@pytest.mark.parametrize("d", [64, 72])
def test_without_bias(d: int, dtype: torch.dtype) -> None:
    against_plain(heads(2, 2, 45, 70, d, None), dtype)


def test_lengths_64_past_a_multiple_of_128() -> None:
    """Other kernels have given NaN at lengths where N mod 128 is 64."""
    against_plain(heads(1, 1, 196, 196, 72, 14), torch.float32, grid_size=14)
    pos = kept(1, 14, 192)
    against_plain(heads(1, 1, 192, 192, 72, 14), torch.float32, grid_size=14, q_pos=pos, k_pos=pos)


@TABLE
def test_qkvpacked(table_grad: str) -> None:
    G, B, H, d = 5, 2, 3, 24
    table = torch.randn((2 * G - 1) ** 2 + 3, H)
    for pos, L in ((None, 25), (kept(B, G, 11), 11)):

        def apart(qkv: Tensor, table: Tensor, pos: Tensor | None = pos) -> Tensor:
            q, k, v = (x.transpose(1, 2) for x in qkv.unbind(2))
            return plain(q, k, v, table, grid_size=G, q_pos=pos, k_pos=pos).transpose(1, 2)

        packed = partial(rel_attention_qkvpacked, grid_size=G, pos=pos, table_grad=table_grad)
        compare(packed, apart, [torch.randn(B, L, 3, H, d), table], torch.float32)


def test_qkvpacked_ragged() -> None:
    G, offsets = 5, torch.tensor([0, 25, 32], dtype=torch.int32)
    pos = torch.cat([torch.arange(25), kept(1, G, 7)[0]])
    args = [torch.randn(32, 3, 2, 16), torch.randn(84, 2)]
    places = {"grid_size": G, "pos": pos, "offsets": offsets}
    packed = partial(rel_attention_qkvpacked, **places)
    compare(packed, partial(packed, attention_backend="sdpa"), args, torch.float32)


@DTYPES
@TABLE
def test_tokens_beyond_the_longest_length_are_left_out(table_grad: str, dtype: torch.dtype) -> None:
    """On a GPU the offsets are not read beforehand: here samples of 3 and 2 with a stated maximum of 2."""
    from mdt_fast.kernels.rel_attention.registered import (
        rel_attention_qkvpacked_bwd,
        rel_attention_qkvpacked_fwd,
    )

    offsets, pos = torch.tensor([0, 3, 5]).int(), torch.tensor([0, 3, 1, 2, 0])
    qkv, table, dout = torch.randn(5, 3, 2, 16), torch.randn(12, 2), torch.randn(5, 2, 16)
    results = []
    for rows, where, starts in (([0, 1, 2, 3, 4], pos, offsets), ([0, 1, 3, 4], pos[[0, 1, 3, 4]], None)):
        x, d = qkv[rows].to(dtype)[None], dout[rows].to(dtype)[None]
        starts = torch.tensor([0, 2, 4]).int() if starts is None else starts
        how = 2, 2, 0.25, "lookup", table_grad  # max_length, grid_size, scale
        out, lse = rel_attention_qkvpacked_fwd(x, table, where, starts, *how)
        dx, dtable = rel_attention_qkvpacked_bwd(d, x, table, where, starts, out, lse, *how, True)
        keep = [rows.index(i) for i in (0, 1, 3, 4)]
        results.append((out[0, keep], dx[0, keep], dtable))
    for beyond, exact in zip(*results, strict=True):
        assert torch.equal(beyond, exact)


def test_small_chunks_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some samples or heads at a time: the same sums in the same order."""
    from mdt_fast.kernels.rel_attention import config

    G, args = 6, heads(5, 3, 36, 36, 16, 6)
    for table_grad, limit in (("store", "DS_BYTES"), ("recompute", "DBIAS_BYTES")):
        op = partial(rel_attention, grid_size=G, table_grad=table_grad)
        whole = run(op, args)
        with monkeypatch.context() as patch:
            patch.setattr(config, limit, 1)
            chunked = run(op, args)
        for a, b in zip(whole, chunked, strict=True):
            assert torch.equal(a, b)


def test_scale_and_a_frozen_table() -> None:
    q, k, v, table = heads(1, 2, 16, 16, 16, 4)
    against_plain([q, k, v, table], torch.float32, grid_size=4, scale=0.7)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = rel_attention(*leaves, table, grid_size=4)
    assert all(x is not None for x in torch.autograd.grad(out.sum(), leaves))


def test_large_scores_stay_finite() -> None:
    args = heads(1, 1, 25, 25, 16, 5)
    args = [100 * args[0], 100 * args[1], args[2], 1e4 * args[3]]
    ours, exact = (
        run(partial(rel_attention, grid_size=5), args),
        run(partial(plain, grid_size=5), [a.double() for a in args]),
    )
    assert all(x.isfinite().all() for x in ours)
    assert relative_error(ours[0], exact[0]) <= FLOAT32 * 100  # at scores of 1e5, float32 resolves 0.01


def test_nothing() -> None:
    """Without samples, queries or keys: empty results, or zeros."""
    G, table = 4, torch.randn(52, 2, requires_grad=True)
    for B, M, N in ((0, 16, 16), (2, 0, 16), (2, 16, 0), (2, 0, 0)):
        q, k, v = (x.requires_grad_() for x in heads(B, 2, M, N, 16, None))
        places = {
            "q_pos": None if M == 16 else torch.zeros(B, M, dtype=torch.int64),
            "k_pos": None if N == 16 else torch.zeros(B, N, dtype=torch.int64),
        }
        out = rel_attention(q, k, v, table, grid_size=G, **places)
        assert out.shape == q.shape
        assert torch.equal(out, torch.zeros_like(out))
        for x, g in zip((q, k, v, table), torch.autograd.grad(out.sum(), (q, k, v, table)), strict=True):
            assert torch.equal(g, torch.zeros_like(x))


def test_strides() -> None:
    """Views of one tensor, an expanded batch and a strided table give the same as contiguous copies."""
    qkv = torch.randn(2, 16, 3, 2, 24)
    q, k, v = (x.transpose(1, 2) for x in qkv.unbind(2))
    table = torch.randn(52, 2)
    apart = rel_attention(q.contiguous(), k.contiguous(), v.contiguous(), table, grid_size=4)
    assert torch.equal(rel_attention(q, k, v, table, grid_size=4), apart)
    one = q[:1].expand(2, -1, -1, -1)
    assert torch.equal(
        rel_attention(one, k, v, table, grid_size=4),
        rel_attention(one.contiguous(), k, v, table, grid_size=4),
    )
    # A table that is a view: every other head of a wider one.
    wide = torch.randn(52, 4)
    assert torch.equal(
        rel_attention(q, k, v, wide[:, ::2], grid_size=4),
        rel_attention(q, k, v, wide[:, ::2].clone(), grid_size=4),
    )


def test_opcheck() -> None:
    from mdt_fast.kernels.rel_attention.registered import rel_attention_fwd, rel_attention_qkvpacked_fwd

    q, k, v, table = (x.requires_grad_() for x in heads(2, 2, 9, 9, 16, 4))
    pos = kept(2, 4, 9)
    settings = (9, 9, 4, 0.25, "lookup", "recompute")
    torch.library.opcheck(rel_attention_fwd.overload, (q, k, v, table, pos, pos, None, None, *settings))
    qkv = torch.randn(2, 9, 3, 2, 16, requires_grad=True)
    torch.library.opcheck(rel_attention_qkvpacked_fwd.overload, (qkv, table, pos, None, *settings[1:]))


def _compiled(op: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(op, fullgraph=True, backend="aot_eager")


def _checkpointed(op: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *a: torch.utils.checkpoint.checkpoint(op, *a, use_reentrant=False)


@pytest.mark.parametrize("wrap", [_compiled, _checkpointed], ids=["compiled", "checkpointed"])
def test_wrapped(wrap: Callable[..., Any]) -> None:
    pos = kept(2, 4, 9)
    op = partial(rel_attention, grid_size=4, q_pos=pos, k_pos=pos)
    same(op, wrap(op), heads(2, 2, 9, 9, 16, 4))
    packed = partial(rel_attention_qkvpacked, grid_size=4, pos=pos)
    same(packed, wrap(packed), [torch.randn(2, 9, 3, 2, 16), torch.randn(52, 2)])


def test_compiled_once_for_all_lengths() -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    packed = torch.compile(rel_attention_qkvpacked, fullgraph=True, backend=counter, dynamic=True)
    table = torch.randn(84, 2)
    for length in (5, 9, 14, 21):
        qkv, pos = torch.randn(2, length, 3, 2, 16), kept(2, 5, length)
        expected = rel_attention_qkvpacked(qkv, table, grid_size=5, pos=pos)
        assert torch.equal(packed(qkv, table, grid_size=5, pos=pos), expected)
    assert counter.frame_count == 1


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.integers(1, 3), st.integers(1, 3), st.integers(2, 7), st.integers(1, 49), st.integers(1, 49),
    st.integers(4, 90), st.sampled_from(["lookup", "dense"]), st.sampled_from(["recompute", "store"]),
)  # fmt: skip
def test_random_shapes(
    B: int, H: int, G: int, M: int, N: int, d: int, bias_form: str, table_grad: str
) -> None:
    # At least two keys: with one, the gradients of q, k and the table are zero but for rounding.
    M, N = min(M, G * G), max(2, min(N, G * G))
    how = {"bias_form": bias_form, "table_grad": table_grad}
    places = {"q_pos": kept(B, G, M), "k_pos": kept(B, G, N)}
    against_plain(heads(B, H, M, N, d, G), torch.float32, how, grid_size=G, **places)
