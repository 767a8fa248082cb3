"""csrc's sweeps over attention's scores against float64: dtypes, ragged lengths, places, determinism."""

import pytest
import torch
from torch import Tensor

from mdt_fast.kernels.native import MISSING, library
from tolerances import relative_error

pytestmark = pytest.mark.skipif(not library("cpu"), reason=f"the C++ ops are {MISSING['cpu']}")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
SHAPES = pytest.mark.parametrize(
    ("n", "H", "M", "N"),
    [(1, 1, 1, 1), (3, 2, 5, 17), (2, 3, 130, 64), (1, 2, 64, 33), (0, 2, 4, 5), (2, 1, 0, 3)],
)
WITH_TABLE = pytest.mark.parametrize("runs", [None, 1, 16], ids=["no table", "scattered", "side by side"])
SCALE = 0.3
call = torch.ops.mdt_fast


def case(
    dtype: torch.dtype, n: int, H: int, M: int, N: int, runs: int | None
) -> tuple[Tensor, list[Tensor | None]]:
    """Scores [n H M, N]; table [H, T], places of queries [n, M] and of keys [n, N], distinct in a sample."""
    torch.manual_seed(0)
    scores = (4 * torch.randn(n * H * M, N)).to(dtype)
    if runs is None:
        return scores, [None, None, None]
    starts = torch.stack([torch.randperm(N) for _ in range(n)]) if n else torch.empty(0, N).long()
    k_places = (torch.arange(N) if runs > 1 else 2 * starts).expand(n, -1)
    q_places = torch.randint(9, (n, M))
    return scores, [torch.randn(H, 9 + 2 * N), q_places.int(), k_places.int()]


def bias_of(table: Tensor | None, q_places: Tensor | None, k_places: Tensor | None) -> Tensor | float:
    """[n, H, M, N]."""
    if table is None or q_places is None or k_places is None:
        return 0.0
    return table[:, q_places[:, :, None].long() + k_places[:, None, :]].transpose(0, 1)


def error_allowed(dtype: torch.dtype) -> float:
    return 1e-5 if dtype == torch.float32 else torch.finfo(dtype).eps


@DTYPES
@SHAPES
@WITH_TABLE
def test_softmax(dtype: torch.dtype, n: int, H: int, M: int, N: int, runs: int | None) -> None:
    scores, places = case(dtype, n, H, M, N, runs)
    places_64 = [x.double() if x is not None and x.is_floating_point() else x for x in places]
    exact = SCALE * scores.double().view(n, H, M, N) + bias_of(*places_64)
    lse = torch.full((H, n * M + 5), torch.nan)  # samples side by side, as attention has them
    of_samples = lse[:, : n * M].unflatten(1, (n, M)).transpose(0, 1)
    p = scores.clone()
    call.attention_softmax_cpu(p, *places, SCALE, of_samples)
    assert relative_error(p.view_as(exact), exact.softmax(-1)) <= error_allowed(dtype)
    assert relative_error(of_samples, exact.logsumexp(-1)) <= 1e-5
    assert lse[:, n * M :].isnan().all()
    again = scores.clone()
    call.attention_softmax_cpu(again, *places, SCALE, torch.empty(n, H, M))
    assert torch.equal(p, again)


@DTYPES
@SHAPES
@WITH_TABLE
def test_gradients(dtype: torch.dtype, n: int, H: int, M: int, N: int, runs: int | None) -> None:
    scores, places = case(dtype, n, H, M, N, runs)
    dp = torch.randn(n * H * M, N).to(dtype)
    table, *rest = places
    table_64 = None if table is None else table.double().requires_grad_()
    x = (SCALE * scores.double().view(n, H, M, N) + bias_of(table_64, *rest)).requires_grad_()
    exact_p, lse = x.softmax(-1), x.detach().logsumexp(-1).float()
    leaves = [x] if table_64 is None else [x, table_64]
    exact = torch.autograd.grad(exact_p, leaves, dp.double().view_as(x))

    def ours() -> list[Tensor]:
        p, ds = scores.clone(), dp.clone()
        dtable = None if table is None else torch.ones_like(table)
        call.attention_softmax_bwd_cpu(p, ds, *places, SCALE, lse, dtable)
        return [p, ds] if dtable is None else [p, ds, dtable - 1]

    results = ours()
    assert relative_error(results[0].view_as(x), exact_p.detach()) <= error_allowed(dtype)
    assert relative_error(results[1].view_as(x), exact[0]) <= 2 * error_allowed(dtype)
    if table is not None:
        assert relative_error(results[2], exact[1]) <= 2e-5
    assert all(torch.equal(a, b) for a, b in zip(results, ours(), strict=True))


def test_the_same_bits_with_any_number_of_threads() -> None:
    scores, places = case(torch.float32, 2, 3, 130, 64, 1)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            p, ds, dtable = scores.clone(), scores.clone(), torch.zeros_like(places[0])
            call.attention_softmax_bwd_cpu(p, ds, *places, SCALE, torch.zeros(2, 3, 130), dtable)
            results.append((p, ds, dtable))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_far_and_not_finite_scores() -> None:
    """Nothing overflows, a row is its own, and what is no number stays none."""
    scores = torch.tensor(
        [[3e38, 3e38, -3e38], [-3e38, -3e38, -3e38], [0.0, torch.nan, 0.0], [1.0, 2.0, 3.0]]
    )
    p, lse = scores.clone(), torch.empty(1, 1, 4)
    call.attention_softmax_cpu(p, None, None, None, 1.0, lse)
    assert p[:2].allclose(torch.tensor([[0.5, 0.5, 0.0], [1 / 3] * 3]))
    assert p[2].isnan().all()
    assert p[3].allclose(scores[3].softmax(0))


def test_bad_sizes_are_refused_by_the_op_itself() -> None:
    scores, (table, q, k) = case(torch.float32, 2, 3, 4, 5, 1)
    lse, more = torch.zeros(2, 3, 4), torch.zeros(3, 30)
    for wrong in (
        (scores[:-1], table, q, k, 1.0, lse),
        (scores.double(), table, q, k, 1.0, lse),
        (scores, table, q, None, 1.0, lse),
        (scores, table[:2], q, k, 1.0, lse),
        (scores, table, q[:1], k, 1.0, lse),
        (scores, table, q.long(), k, 1.0, lse),
        (scores, table, q + 11, k, 1.0, lse),
        (scores, table, q - 9, k, 1.0, lse),
        (scores, table, q, k, 1.0, lse.double()),
        (scores[:, :0], None, None, None, 1.0, lse),
    ):
        with pytest.raises(RuntimeError, match="expected"):
            call.attention_softmax_cpu(*wrong)
    for dp, dtable in ((scores[:-1], None), (scores.clone(), more), (scores.clone(), table.double())):
        with pytest.raises(RuntimeError, match="expected"):
            call.attention_softmax_bwd_cpu(scores.clone(), dp, table, q, k, 1.0, lse, dtable)
