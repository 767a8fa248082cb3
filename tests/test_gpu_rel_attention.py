"""``rel_attention`` compiled and run on a GPU: bfloat16 too, the published shapes, Inductor, no waiting."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from mdt_fast.kernels import rel_attention, rel_attention_qkvpacked
from parity import compare, run, same
from tolerances import relative_error

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("full_float32")]

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
WAYS = pytest.mark.parametrize(
    ("bias_form", "table_grad"), [("lookup", "recompute"), ("dense", "store")], ids="-".join
)
plain = partial(rel_attention, attention_backend="sdpa")


def heads(B: int, H: int, M: int, N: int, d: int, G: int | None) -> list[Tensor]:
    torch.manual_seed(0)
    shapes = [(B, H, M, d), (B, H, N, d), (B, H, N, d)]
    shapes += [] if G is None else [((2 * G - 1) ** 2 + 3, H)]
    return [torch.randn(s, device="cuda") for s in shapes]


def kept(B: int, G: int, length: int) -> Tensor:
    return torch.rand(B, G * G, device="cuda").argsort(1)[:, :length].sort(1).values


@DTYPES
@WAYS
@pytest.mark.parametrize("length", [None, 128, 153, 179, 192])
@pytest.mark.parametrize("d", [64, 72])
def test_published_shapes(
    d: int, length: int | None, bias_form: str, table_grad: str, dtype: torch.dtype
) -> None:
    n = length or 256
    pos = None if length is None else kept(2, 16, n)
    op = partial(
        rel_attention, bias_form=bias_form, table_grad=table_grad, grid_size=16, q_pos=pos, k_pos=pos
    )
    compare(op, partial(plain, grid_size=16, q_pos=pos, k_pos=pos), heads(2, 4, n, n, d, 16), dtype)


@DTYPES
@pytest.mark.parametrize("d", [16, 20, 32, 36, 40, 68, 80, 96, 112, 128])
def test_head_sizes(d: int, dtype: torch.dtype) -> None:
    compare(
        partial(rel_attention, grid_size=9), partial(plain, grid_size=9), heads(2, 2, 81, 81, d, 9), dtype
    )


@DTYPES
@pytest.mark.parametrize("G", [4, 9, 16])
@pytest.mark.parametrize("d", [16, 40, 128])
def test_stored_scores_of_head_and_grid_sizes(d: int, G: int, dtype: torch.dtype) -> None:
    """Nine samples: each tile of stored scores has two programs, one of which gets one sample more."""
    op = partial(rel_attention, grid_size=G, table_grad="store")
    compare(op, partial(plain, grid_size=G), heads(9, 2, G * G, G * G, d, G), dtype)


@DTYPES
@pytest.mark.parametrize("begin", [1, 4])
def test_rows_that_begin_anywhere(begin: int, dtype: torch.dtype) -> None:
    """Heads cut out of wider rows: nothing is aligned to 16 bytes."""

    def op(*args: Tensor, **how: Any) -> Tensor:
        q, k, v = (x[..., begin : begin + 72] for x in args[:3])
        return rel_attention(q, k, v, args[3], grid_size=9, **how)

    compare(op, partial(op, attention_backend="sdpa"), heads(2, 2, 81, 81, 79, 9), dtype)


@pytest.mark.parametrize("table_grad", ["recompute", "store"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("d", [64, 72, 128])
def test_tf32_where_products_of_float32_may_be(d: int, masked: bool, table_grad: str) -> None:
    """Ten bits of each operand count, as in PyTorch's own products where TF32 is allowed. Triton leaves the
    rounding to the tensor cores; if those truncate, results are off by up to 3.3e-3 (computed with truncated
    operands over 13 seeds)."""
    pos = kept(3, 16, 153) if masked else None
    op = partial(rel_attention, grid_size=16, q_pos=pos, k_pos=pos, table_grad=table_grad)
    args = heads(3, 4, 153 if masked else 256, 153 if masked else 256, d, 16)
    exact = run(partial(plain, grid_size=16, q_pos=pos, k_pos=pos), [a.double() for a in args])
    torch.backends.cuda.matmul.fp32_precision = "tf32"  # the fixture turns it off again
    ours, again = run(op, args), run(op, args)
    for i, (a, b, e) in enumerate(zip(ours, again, exact, strict=True)):
        assert torch.equal(a, b), f"result {i}: two runs differ"
        assert 1e-5 < relative_error(a, e) < 5e-3, f"result {i}"


@DTYPES
@pytest.mark.parametrize("d", [64, 72])
def test_without_bias(d: int, dtype: torch.dtype) -> None:
    compare(rel_attention, plain, heads(2, 3, 100, 256, d, None), dtype)


@DTYPES
@pytest.mark.parametrize("table_grad", ["recompute", "store"])
def test_packed_samples_of_different_lengths(table_grad: str, dtype: torch.dtype) -> None:
    lengths = [256, 153, 0, 256, 1, 77]
    offsets = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32, device="cuda")
    pos = torch.cat([kept(1, 16, n)[0] for n in lengths])
    args = [torch.randn(sum(lengths), 3, 2, 72, device="cuda"), torch.randn(964, 2, device="cuda")]
    op = partial(
        rel_attention_qkvpacked, grid_size=16, pos=pos, offsets=offsets, max_length=256, table_grad=table_grad
    )
    compare(op, partial(op, attention_backend="sdpa"), args, dtype)


def test_four_thousand_tokens() -> None:
    args = heads(1, 2, 4096, 4096, 72, 64)
    for how in ({"table_grad": "recompute"}, {"table_grad": "store"}, {"bias_form": "dense"}):
        compare(
            partial(rel_attention, grid_size=64, **how), partial(plain, grid_size=64), args, torch.bfloat16
        )


@pytest.mark.parametrize("length", [None, 153])
def test_under_inductor(length: int | None) -> None:
    pos = None if length is None else kept(2, 16, length)
    op = partial(rel_attention_qkvpacked, grid_size=16, pos=pos)
    args = [torch.randn(2, length or 256, 3, 4, 72, device="cuda"), torch.randn(964, 4, device="cuda")]
    same(op, torch.compile(op, fullgraph=True), args)


def test_memory_grows_with_tokens_not_their_square() -> None:
    """No [B, H, L, L] tensor, forward or backward: one would be 2 GiB here."""
    q, k, v, table = (x.requires_grad_() for x in heads(4, 16, 4096, 4096, 64, 64))
    for table_grad in ("recompute", "store"):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        out = rel_attention(*(x.bfloat16() for x in (q, k, v)), table, grid_size=64, table_grad=table_grad)
        torch.autograd.grad(out.float().sum(), (q, k, v, table))
        assert torch.cuda.max_memory_allocated() - before < 4 * 16 * 4096 * 4096 * 2


def test_never_waits_for_the_device() -> None:
    args = [x.requires_grad_() for x in heads(2, 2, 153, 153, 72, 16)]
    pos = kept(2, 16, 153)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for table_grad in ("recompute", "store"):
            out = rel_attention(*args, grid_size=16, q_pos=pos, k_pos=pos, table_grad=table_grad)
            torch.autograd.grad(out.sum(), args)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@DTYPES
def test_poisoned_memory(dtype: torch.dtype) -> None:
    """Memory that a kernel forgets to write shows up as NaN."""
    args = [x.to(dtype) for x in heads(2, 2, 153, 153, 72, 16)]
    pos = kept(2, 16, 153)
    op: Any = partial(rel_attention, grid_size=16, q_pos=pos, k_pos=pos)
    for table_grad in ("recompute", "store"):
        torch.full((2**27,), torch.nan, device="cuda")  # freed at once: the next allocations reuse it
        assert all(x.isfinite().all() for x in run(partial(op, table_grad=table_grad), args))
