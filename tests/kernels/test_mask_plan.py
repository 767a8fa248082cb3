"""``mask_plan``: csrc's op and the PyTorch reference against ``argsort``, ties, extremes, refusals."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mdt_fast.errors import UserError
from mdt_fast.kernels import MaskIds, mask_plan
from mdt_fast.kernels.mask_plan import reference
from mdt_fast.kernels.native import MISSING, library
from mdt_fast.masking import MaskPlan

needs_library = pytest.mark.skipif(not library("cpu"), reason=f"csrc: {MISSING['cpu']}")
BOTH = pytest.mark.parametrize(
    "plan", [pytest.param(mask_plan, id="csrc", marks=needs_library), reference.mask_plan]
)
Plan = Callable[[Tensor, int], tuple[Tensor, ...]]


def check(plan: Plan, noise: Tensor, len_keep: int) -> None:
    """Compare ``plan`` with two sorts, written out."""
    ids_keep, ids_mask, ids_restore, mask = plan(noise, len_keep)
    B, L = noise.shape
    order = torch.argsort(noise.double(), dim=1, stable=True)
    assert torch.equal(ids_keep, order[:, :len_keep].sort(1).values)
    assert torch.equal(ids_mask, order[:, len_keep:].sort(1).values)
    in_order = torch.cat([ids_keep, ids_mask], dim=1).gather(1, ids_restore)
    assert torch.equal(in_order, torch.arange(L).expand(B, -1))
    assert torch.equal(mask, (ids_restore >= len_keep).float())
    assert ids_keep.dtype == ids_mask.dtype == ids_restore.dtype == torch.int64


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("B", "L"), [(1, 1), (3, 17), (32, 256), (2, 4096), (1, 5000)])
def test_against_argsort(plan: Plan, B: int, L: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    noise = torch.rand(B, L).to(dtype)  # half types give many ties
    for len_keep in sorted({0, 1, L // 2, L - 1, L}):
        check(plan, noise, len_keep)


@BOTH
@settings(max_examples=150, deadline=None, derandomize=True)
@given(data=st.data())
def test_ties_and_extremes(plan: Plan, data: st.DataObject) -> None:
    values = [0.0, -0.0, 1.0, -1.0, 1e-45, -1e-45, 3e38, -3e38, float("inf"), -float("inf")]
    B, L = data.draw(st.integers(0, 3)), data.draw(st.integers(0, 40))
    rows = st.lists(st.sampled_from(values), min_size=L, max_size=L)
    noise = torch.tensor([data.draw(rows) for _ in range(B)]).reshape(B, L)
    check(plan, noise, data.draw(st.integers(0, L)))


@BOTH
def test_other_strides(plan: Plan) -> None:
    noise = torch.rand(64, 7).t()
    check(plan, noise, 30)
    check(plan, torch.rand(3, 1).expand(3, 20), 5)  # all equal: the first five


@needs_library
def test_the_number_of_threads_changes_nothing() -> None:
    noise, threads = torch.rand(200, 256), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = mask_plan(noise, 150)
        torch.set_num_threads(4)
        assert all(torch.equal(a, b) for a, b in zip(one, mask_plan(noise, 150), strict=True))
    finally:
        torch.set_num_threads(threads)


@needs_library
def test_opcheck_and_compile() -> None:
    noise = torch.rand(4, 50)
    torch.library.opcheck(torch.ops.mdt_fast.mask_plan.default, (noise, 20))
    compiled = torch.compile(mask_plan, fullgraph=True, dynamic=True, backend="aot_eager")
    for B, L, K in ((4, 50, 20), (3, 60, 33)):
        noise = torch.rand(B, L)
        for ours, expected in zip(compiled(noise, K), mask_plan(noise, K), strict=True):
            assert torch.equal(ours, expected)


def test_a_plan_in_ascending_order() -> None:
    noise = torch.rand(3, 31)
    ours, expected = MaskPlan.from_noise(noise, 12, ascending=True), MaskPlan.from_noise(noise, 12).sorted()
    for field in ("ids_keep", "ids_mask", "ids_restore", "mask"):
        assert torch.equal(getattr(ours, field), getattr(expected, field)), field
    torch.manual_seed(5)
    drawn = MaskPlan.draw(2, 16, 0.5, random_ratio=True, ascending=True)
    torch.manual_seed(5)
    assert torch.equal(
        drawn.ids_keep, MaskPlan.draw(2, 16, 0.5, random_ratio=True).ids_keep.sort(dim=1).values
    )
    with pytest.raises(UserError, match="len_keep: got 32"):
        MaskPlan.from_noise(noise, 32, ascending=True)


def test_result_has_names_and_no_gradients() -> None:
    plan = mask_plan(torch.rand(2, 9, requires_grad=True), 4)
    assert isinstance(plan, MaskIds)
    assert plan.ids_keep.shape == (2, 4)
    assert not any(tensor.requires_grad for tensor in plan)


@pytest.mark.parametrize(
    ("noise", "len_keep", "message"),
    [
        (torch.rand(8), 2, r"noise: torch.float32 \[8\], expected floating-point \[B, L\]"),
        (torch.ones(2, 8, dtype=torch.int64), 2, "noise: torch.int64"),
        (torch.rand(2, 8), 9, r"len_keep: got 9, expected 0..8"),
        (torch.rand(2, 8), -1, r"len_keep: got -1, expected 0..8"),
        (torch.rand(2, 8), 2.0, "len_keep: got 2.0, expected an integer"),
        (torch.full((2, 8), float("nan")), 2, "noise: has NaN values"),
    ],
)
def test_bad_input(noise: Tensor, len_keep: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mask_plan(noise, len_keep)


@pytest.mark.gpu
@pytest.mark.skipif(not library("cuda"), reason=f"csrc: {MISSING['cuda']}")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("B", "L"), [(1, 1), (3, 255), (32, 256), (4, 1000), (2, 4096), (2, 5000)])
def test_on_a_gpu(B: int, L: int, dtype: torch.dtype) -> None:
    noise = torch.rand(B, L).to(dtype)
    for len_keep in {0, 1, L // 2, L}:
        check(lambda x, k: tuple(t.cpu() for t in mask_plan(x.cuda(), k)), noise, len_keep)


@pytest.mark.gpu
@pytest.mark.skipif(not library("cuda"), reason=f"csrc: {MISSING['cuda']}")
def test_on_a_gpu_nan_stands_last_and_nothing_waits() -> None:
    noise = torch.rand(2, 256)
    noise[0, 3] = float("nan")
    on_gpu = noise.cuda()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        plan = mask_plan(on_gpu, 255)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert plan.ids_mask[0].tolist() == [3]
    compiled = torch.compile(partial(mask_plan, len_keep=100), fullgraph=True)
    assert all(torch.equal(a, b) for a, b in zip(compiled(on_gpu), mask_plan(on_gpu, 100), strict=True))
