"""Token moves and ``patch_embed`` in Triton's interpreter (``TRITON_INTERPRET=1``; ``make test`` does).

Forward and every gradient against float64; none, some and all tokens kept; repeated ids. B samples, L
tokens, K kept, D width, C channels, p patch side, G grid side.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from mdt_fast.kernels import gather_tokens, merge_tokens, patch_embed
from mdt_fast.kernels.backends import INTERPRETING
from mdt_fast.kernels.patch_embed import reference as plain_embed
from mdt_fast.kernels.tokens import reference as plain
from mdt_fast.masking import MaskPlan
from parity import compare, poisoned, same
from tolerances import FLOAT32, relative_error

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.skipif(not INTERPRETING, reason="needs TRITON_INTERPRET=1 in the environment"),
]

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
KEPT = pytest.mark.parametrize(
    ("B", "L", "K", "D"), [(1, 1, 1, 4), (3, 9, 4, 24), (2, 7, 0, 8), (2, 7, 7, 72), (1, 300, 290, 8)]
)


@pytest.fixture(autouse=True)
def _poison(monkeypatch: pytest.MonkeyPatch) -> Any:
    with poisoned(monkeypatch):
        yield


def plan(B: int, L: int, K: int) -> MaskPlan:
    return MaskPlan.from_noise(torch.rand(B, L), K).sorted()


@DTYPES
@KEPT
@pytest.mark.parametrize("restore", [False, True], ids=["searched", "restore"])
def test_gather_tokens(B: int, L: int, K: int, D: int, restore: bool, dtype: torch.dtype) -> None:
    where = plan(B, L, K)
    op = partial(gather_tokens, ids_BK=where.ids_keep, ids_restore_BL=where.ids_restore if restore else None)
    compare(op, partial(plain.gather_tokens, ids_BK=where.ids_keep), [torch.randn(B, L, D)], dtype)


@DTYPES
def test_gather_tokens_that_repeat(dtype: torch.dtype) -> None:
    ids = torch.randint(0, 5, (2, 300))
    compare(
        partial(gather_tokens, ids_BK=ids),
        partial(plain.gather_tokens, ids_BK=ids),
        [torch.randn(2, 7, 8)],
        dtype,
    )


@DTYPES
@KEPT
def test_merge_tokens(B: int, L: int, K: int, D: int, dtype: torch.dtype) -> None:
    where = {"ids_restore_BL": plan(B, L, K).ids_restore}
    args = [torch.randn(B, L, D), torch.randn(B, L - K, D)]
    compare(partial(merge_tokens, **where), partial(plain.merge_tokens, **where), args, dtype)


def test_merged_tokens_of_a_wrong_plan_reach_no_other_memory() -> None:
    """A GPU does not check ids: places beyond the grid read some computed token and write nothing."""
    from mdt_fast.kernels.tokens.kernel import merge_tokens_bwd_kernel
    from mdt_fast.kernels.tokens.move_op import merge_tokens_fwd

    around = torch.full((3, 5), 7.0)
    x, computed, wrong = torch.zeros(1, 4, 5), around[1:2].view(1, 1, 5), torch.tensor([[0, 1, 2, 9]])
    assert (merge_tokens_fwd(x, computed, wrong)[0, 3] == 7).all()
    around, dx = torch.zeros(9, 5), torch.empty(1, 4, 5)
    merge_tokens_bwd_kernel[(4,)](torch.ones(1, 4, 5), wrong, dx, around[1:2], 4, 1, 5, BLOCK_D=8)
    assert not around.any()


def embedding(B: int, C: int, p: int, G: int, D: int) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(s) for s in ((B, C, G * p, G * p), (D, C, p, p), (D,), (1, G * G, D))]


def against_plain(args: list[Tensor], dtype: torch.dtype, ids: Tensor | None) -> None:
    compare(partial(patch_embed, ids_BK=ids), partial(plain_embed.patch_embed, ids_BK=ids), args, dtype)


@DTYPES
@pytest.mark.parametrize("ids", [None, 5, 0], ids=["all", "chosen", "none"])
@pytest.mark.parametrize(
    ("B", "C", "p", "G", "D"), [(2, 4, 2, 9, 24), (9, 1, 1, 3, 8), (3, 3, 3, 2, 70), (2, 4, 8, 3, 72)]
)
def test_patch_embed(B: int, C: int, p: int, G: int, D: int, ids: int | None, dtype: torch.dtype) -> None:
    """Chosen tokens repeat; patches hold 1, 16, 27 and 256 numbers."""
    chosen = None if ids is None else torch.randint(0, G * G, (B, ids))
    against_plain(embedding(B, C, p, G, D), dtype, chosen)


def test_patch_embed_of_nothing() -> None:
    args = [a.requires_grad_() for a in embedding(0, 4, 2, 3, 8)]
    out = patch_embed(*args)
    assert out.shape == (0, 9, 8)
    for a, g in zip(args, torch.autograd.grad(out.sum(), args), strict=True):
        assert torch.equal(g, torch.zeros_like(a))


def test_patch_embed_under_autocast_has_the_reference_dtype() -> None:
    args = embedding(2, 4, 2, 3, 8)
    with torch.autocast("cpu", torch.float16):
        ours, expected = patch_embed(*args), plain_embed.patch_embed(*args)
    assert ours.dtype == expected.dtype == torch.float32
    assert (ours - expected).abs().max() < 0.02


def test_patch_embed_with_a_wider_position_embedding() -> None:
    args = embedding(2, 4, 2, 3, 8)
    args[3] = args[3].double()
    results = []
    for op in (patch_embed, plain_embed.patch_embed):
        leaves = [a.clone().requires_grad_() for a in args]
        out = op(*leaves)
        results.append([out, *torch.autograd.grad(out.sum(), leaves)])
    for ours, expected in zip(*results, strict=True):
        assert ours.dtype == expected.dtype
        assert relative_error(ours, expected) < FLOAT32


def test_opcheck() -> None:
    from mdt_fast.kernels.patch_embed.triton_op import patch_embed_fwd
    from mdt_fast.kernels.tokens.move_op import gather_tokens_fwd, merge_tokens_fwd

    where = plan(2, 9, 4)
    x, computed = torch.randn(2, 9, 8, requires_grad=True), torch.randn(2, 5, 8, requires_grad=True)
    torch.library.opcheck(gather_tokens_fwd.overload, (x, where.ids_keep, None))
    torch.library.opcheck(gather_tokens_fwd.overload, (x, where.ids_keep, where.ids_restore))
    torch.library.opcheck(merge_tokens_fwd.overload, (x, computed, where.ids_restore))
    args = [a.requires_grad_() for a in embedding(2, 4, 2, 3, 8)]
    torch.library.opcheck(patch_embed_fwd.overload, (*args, None, torch.float32))
    torch.library.opcheck(patch_embed_fwd.overload, (*args, where.ids_keep, torch.float32))


def _compiled(op: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(op, fullgraph=True, backend="aot_eager")


def _checkpointed(op: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *a: torch.utils.checkpoint.checkpoint(op, *a, use_reentrant=False)


@pytest.mark.parametrize("wrap", [_compiled, _checkpointed], ids=["compiled", "checkpointed"])
def test_wrapped(wrap: Callable[..., Any]) -> None:
    where = plan(2, 9, 4)
    gather = partial(gather_tokens, ids_BK=where.ids_keep, ids_restore_BL=where.ids_restore)
    same(gather, wrap(gather), [torch.randn(2, 9, 8)])
    merge = partial(merge_tokens, ids_restore_BL=where.ids_restore)
    same(merge, wrap(merge), [torch.randn(2, 9, 8), torch.randn(2, 5, 8)])
    for ids in (None, where.ids_keep):
        embed = partial(patch_embed, ids_BK=ids)
        same(embed, wrap(embed), embedding(2, 4, 2, 3, 8))


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.integers(1, 5),
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(1, 5),
    st.integers(1, 80),
    st.booleans(),
)
def test_patch_embed_random_shapes(B: int, C: int, p: int, G: int, D: int, some: bool) -> None:
    ids = torch.randint(0, G * G, (B, 3)) if some else None
    against_plain(embedding(B, C, p, G, D), torch.float32, ids)
