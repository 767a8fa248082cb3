"""csrc's attention and transposes alone: what the kernel rooms never ask of them, bits, refusals."""

import pytest
import torch
from torch import Tensor

from mdt_fast.kernels.native import MISSING, library
from tolerances import FLOAT32, relative_error

pytestmark = pytest.mark.skipif(not library("cpu"), reason=f"the C++ ops are {MISSING['cpu']}")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
SHAPES = pytest.mark.parametrize(
    ("B", "H", "M", "N", "d"),
    [
        (1, 1, 1, 1, 1),
        (3, 2, 5, 17, 7),
        (2, 3, 130, 64, 16),
        (1, 2, 300, 33, 72),
        (2, 2, 65, 31, 24),
        (0, 2, 4, 5, 3),
        (2, 1, 0, 3, 8),
        (2, 2, 3, 0, 8),
    ],
)
WITH_TABLE = pytest.mark.parametrize("runs", [None, 1, 16], ids=["no table", "scattered", "side by side"])
SCALE = 0.3
call = torch.ops.mdt_fast


def case(
    dtype: torch.dtype, B: int, H: int, M: int, N: int, d: int, runs: int | None
) -> tuple[list[Tensor], list[Tensor | None]]:
    """dout, q [B, H, M, d] and k, v [B, H, N, d], not contiguous; table [T, H]; places of queries [B, M] and
    of keys [B, N], distinct within a sample, whose sums count rows from the table's last one."""
    torch.manual_seed(0)
    dout, q = torch.randn(B, M, 2, H, d).to(dtype).transpose(1, 3).unbind(2)
    k, v = torch.randn(B, N, 2, H, d).to(dtype).transpose(1, 3).unbind(2)
    if runs is None:
        return [dout, q, k, v], [None, None, None]
    starts = torch.stack([torch.randperm(N) for _ in range(B)]) if B else torch.empty(0, N).long()
    k_places = (torch.arange(N) if runs > 1 else 2 * starts).expand(B, -1)
    return [dout, q, k, v], [torch.randn(9 + 2 * N, H), torch.randint(9, (B, M)).int(), k_places.int()]


def exact(tensors: list[Tensor], places: list[Tensor | None]) -> list[Tensor]:
    """out, lse [H, B M], and the gradients of q, k, v (and the table), in float64."""
    dout, *leaves = (x.double().requires_grad_() for x in tensors)
    q, k, v = leaves
    scores = SCALE * q @ k.mT
    table, q_places, k_places = places
    if table is not None and q_places is not None and k_places is not None:
        leaves.append(table.double().requires_grad_())
        index = q_places[:, :, None].long() + k_places[:, None, :]
        scores = scores + leaves[-1].flip(0)[index].movedim(3, 1)
    out, lse = scores.softmax(-1) @ v, scores.logsumexp(-1).transpose(0, 1).flatten(1)
    return [out, lse, *torch.autograd.grad(out, leaves, dout)]


def ours(tensors: list[Tensor], places: list[Tensor | None]) -> list[Tensor]:
    """The same by the two ops; outputs start as NaN, so that unwritten memory shows."""
    dout, q, k, v = tensors
    out = torch.full_like(q, torch.nan)
    lse = torch.full((q.shape[1], q.shape[0] * q.shape[2]), torch.nan)
    call.rel_attention_fwd_cpu(q, k, v, *places, None, None, SCALE, out, lse)
    gradients = [torch.full_like(x, torch.nan) for x in (q, k, v)]
    dtable = None if places[0] is None else torch.ones_like(places[0])
    call.rel_attention_bwd_cpu(dout, q, k, v, *places, None, None, SCALE, lse, *gradients, dtable)
    return [out, lse, *gradients, *([] if dtable is None else [dtable - 1])]


@DTYPES
@SHAPES
@WITH_TABLE
def test_forward_and_gradients(
    dtype: torch.dtype, B: int, H: int, M: int, N: int, d: int, runs: int | None
) -> None:
    given = case(dtype, B, H, M, N, d, runs)
    results, expected = ours(*given), exact(*given)
    if not N:
        assert not results[0].any()
        assert not results[2].any()
        return
    allowed = 2 * FLOAT32 if dtype == torch.float32 else 3 * torch.finfo(dtype).eps
    assert max(relative_error(r, e) for r, e in zip(results, expected, strict=True)) <= allowed
    assert relative_error(results[1], expected[1]) <= (FLOAT32 if dtype != torch.bfloat16 else 1e-4)
    assert all(torch.equal(a, b) for a, b in zip(results, ours(*given), strict=True))


def test_gradients_of_scores_cancel() -> None:
    """A row's gradients add up to 0, though all of its probabilities come from one rounded logarithm: offsets
    shared by all keys or by all values leave little in the gradients."""
    (dout, q, k, v), (table, *places) = case(torch.float32, 2, 2, 65, 96, 24, 1)
    assert table is not None
    given = [dout + 1, q, k + 3, v + 10], [table + 10, *places]
    _, _, *errors = (relative_error(a, b) for a, b in zip(ours(*given), exact(*given), strict=True))
    for error, allowed in zip(errors, (4, 1, 1, 1), strict=True):  # q, k, v and the table
        assert error <= allowed * FLOAT32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_same_bits_with_any_number_of_threads(dtype: torch.dtype) -> None:
    given = case(dtype, 2, 3, 300, 64, 24, 1)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(ours(*given))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_samples_of_different_lengths_stand_apart() -> None:
    """With offsets, each gives what it gives alone, whatever the longest one left in memory."""
    (dout, q, k, v), _ = case(torch.bfloat16, 1, 2, 80, 97, 24, None)
    q_ends, k_ends = [0, 70, 70, 73, 80], [0, 60, 77, 80, 97]
    offsets = [torch.tensor(ends).int() for ends in (q_ends, k_ends)]
    out, lse = torch.empty_like(q), torch.empty(2, 80)
    call.rel_attention_fwd_cpu(q, k, v, None, None, None, *offsets, SCALE, out, lse)
    together = [torch.empty_like(x) for x in (q, k, v)]
    call.rel_attention_bwd_cpu(dout, q, k, v, None, None, None, *offsets, SCALE, lse, *together, None)
    for a, b, c, e in zip(q_ends, q_ends[1:], k_ends, k_ends[1:], strict=False):
        of_q, of_k = slice(a, b), slice(c, e)
        alone = [x[:, :, rows] for x, rows in zip((dout, q, k, v), (of_q, of_q, of_k, of_k), strict=True)]
        results = ours(alone, [None, None, None])
        assert torch.equal(out[:, :, of_q], results[0])
        for gradient, rows, expected in zip(together, (of_q, of_k, of_k), results[2:], strict=True):
            assert torch.equal(gradient[:, :, rows], expected)


def test_far_and_not_finite_scores() -> None:
    """Nothing overflows, rows do not affect each other, and NaN stays NaN."""
    q = torch.tensor([[3e37, 3e37, -3e37], [-3e37, -3e37, -3e37], [0.0, torch.nan, 0.0], [1.0, 2.0, 3.0]])
    k, out, lse = torch.eye(3)[None, None], torch.empty(1, 1, 4, 3), torch.empty(1, 4)
    call.rel_attention_fwd_cpu(q[None, None], k, k, None, None, None, None, None, 10.0, out, lse)
    p = out[0, 0]
    assert p[:2].allclose(torch.tensor([[0.5, 0.5, 0.0], [1 / 3] * 3]))
    assert p[2].isnan().all()
    assert p[3].allclose((10 * q[3]).softmax(0))


def test_what_does_not_fit_is_refused_by_the_op_itself() -> None:
    (dout, q, k, v), (table, m, n) = case(torch.float32, 2, 3, 4, 5, 8, 1)
    out, lse, ends = torch.empty_like(q), torch.empty(3, 8), torch.tensor([0, 4]).int()
    good = [q, k, v, table, m, n, None, None, 1.0, out, lse]
    call.rel_attention_fwd_cpu(*good)
    for place, wrong in (
        (0, q.double()), (0, q[:, :2]), (0, q.mT.contiguous().mT), (1, k.bfloat16()), (1, k[..., :4]),
        (2, v[:, :, :4]),
        (3, table.double()), (3, table[:, :2].clone()),
        (3, None), (4, None), (4, m.long()), (4, m[:1]), (4, m[:, :3]),
        (4, m + 11), (5, n - 9), (5, n[:, :2]), (6, ends), (7, ends), (9, out[:1]), (9, out.bfloat16()),
        (10, lse[:2]), (10, lse.double()),
    ):  # fmt: skip
        with pytest.raises(RuntimeError, match="expected"):
            call.rel_attention_fwd_cpu(*good[:place], wrong, *good[place + 1 :])
    rest = [torch.empty_like(x) for x in (q, k, v)]
    good = [dout, q, k, v, table, m, n, None, None, 1.0, lse, *rest, None]
    call.rel_attention_bwd_cpu(*good)
    for place, wrong in (
        (0, dout[:1]), (11, rest[0][:1]), (12, rest[1].half()), (13, rest[2][:, :2]),
        (14, table.double()), (14, torch.zeros(30, 3)),
    ):  # fmt: skip
        with pytest.raises(RuntimeError, match="expected"):
            call.rel_attention_bwd_cpu(*good[:place], wrong, *good[place + 1 :])
    one = [x[:1] for x in (q, k, v)]
    for more in (ends, torch.tensor([0, 2, 4]).int()):  # more samples of queries than of keys, and fewer
        fewer = torch.tensor([0, 5]).int() if len(more) == 3 else torch.tensor([0, 2, 5]).int()
        with pytest.raises(RuntimeError, match="k_offsets: expected as many samples"):
            call.rel_attention_fwd_cpu(
                *one, table, m[:1], n[:1], more, fewer, 1.0, out[:1], lse[:, :4].contiguous()
            )
    for wrong_ends in ([0, 5], [0, 4, 3], [-1, 4], [0, 3], [1, 4], [0]):
        wrong = torch.tensor(wrong_ends).int()
        with pytest.raises(RuntimeError, match="offsets: expected"):
            call.rel_attention_fwd_cpu(
                *one, None, None, None, wrong, wrong, 1.0, torch.empty_like(one[0]), torch.empty(3, 4)
            )


@DTYPES
@pytest.mark.parametrize("shape", [(0, 3), (1, 1), (16, 16), (65, 130), (200, 17)], ids=str)
def test_transposes(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x = torch.randn(shape).to(dtype)
    out = torch.full((shape[1], shape[0]), torch.nan, dtype=dtype)
    call.transposed_cpu(x, out)
    assert torch.equal(out, x.t())


def test_transposes_that_do_not_fit() -> None:
    x = torch.randn(4, 6)
    for given, out in (
        (x, torch.empty(4, 6)),
        (x.t(), torch.empty(4, 6)),
        (x, torch.empty(6, 4).half()),
        (x.double(), torch.empty(6, 4).double()),
        (x[0], torch.empty(6, 1)),
    ):
        with pytest.raises(RuntimeError, match="expected"):
            call.transposed_cpu(given, out)
