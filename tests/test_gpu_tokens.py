"""Token moves, ``patch_embed``, ``cfg_step`` and ``skip_linear`` compiled and run on a GPU; bfloat16 too."""

from functools import partial

import pytest
import torch
from torch import Tensor

from mdt_fast import MaskPlan, kernels
from mdt_fast.kernels.cfg_step import reference as plain_step
from mdt_fast.kernels.patch_embed import reference as plain_embed
from mdt_fast.kernels.skip_linear import reference as plain_skip
from mdt_fast.kernels.tokens import reference as plain_tokens
from parity import compare, same
from tolerances import FLOAT32, relative_error

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("full_float32")]

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)


def randn(*shapes: tuple[int, ...]) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(s, device="cuda") for s in shapes]


@DTYPES
@pytest.mark.parametrize(
    ("B", "L", "K", "D"), [(1, 1, 1, 8), (3, 64, 0, 72), (4, 256, 153, 1152), (2, 9, 4, 8192)]
)
def test_moves(B: int, L: int, K: int, D: int, dtype: torch.dtype) -> None:
    where = MaskPlan.from_noise(torch.rand(B, L, device="cuda"), K).sorted()
    for ids, restore in (
        (where.ids_keep, where.ids_restore),
        (torch.randint(0, L, (B, K), device="cuda"), None),
    ):
        op = partial(kernels.gather_tokens, ids_BK=ids, ids_restore_BL=restore)
        compare(op, partial(plain_tokens.gather_tokens, ids_BK=ids), randn((B, L, D)), dtype)
    there = {"ids_restore_BL": where.ids_restore}
    op, plain = partial(kernels.merge_tokens, **there), partial(plain_tokens.merge_tokens, **there)
    compare(op, plain, randn((B, L, D), (B, L - K, D)), dtype)


@DTYPES
@pytest.mark.parametrize("K", [None, 153])
@pytest.mark.parametrize(("C", "p", "D"), [(4, 2, 1152), (3, 4, 384), (4, 8, 72)])
def test_patch_embed(C: int, p: int, D: int, K: int | None, dtype: torch.dtype) -> None:
    ids = None if K is None else torch.randint(0, 256, (5, K), device="cuda")
    args = randn((5, C, 16 * p, 16 * p), (D, C, p, p), (D,), (1, 256, D))
    op, plain = (partial(f, ids_BK=ids) for f in (kernels.patch_embed, plain_embed.patch_embed))
    compare(op, plain, args, dtype)


@DTYPES
def test_skip_linear(dtype: torch.dtype) -> None:
    args = randn((3, 179, 384), (3, 179, 384), (384, 768), (384,))
    compare(kernels.skip_linear, plain_skip.skip_linear, args, dtype)
    same(kernels.skip_linear, kernels.skip_linear, [a.to(dtype) for a in args])


@DTYPES
@pytest.mark.parametrize("kind", ["ddpm", "ddim"])
def test_cfg_step(kind: str, dtype: torch.dtype) -> None:
    output, x, noise = randn((8, 8, 32, 32), (8, 4, 32, 32), (8, 4, 32, 32))
    a = torch.linspace(0.999, 0.01, 50)
    table = (kernels.ddpm_coefficients(a) if kind == "ddpm" else kernels.ddim_coefficients(a, 0.5)).cuda()
    scale = torch.full((4,), 3.8, device="cuda")
    ours = kernels.cfg_step(output.to(dtype), x, noise, table[7], scale=scale, kind=kind)
    exact = plain_step.cfg_step(
        output.to(dtype).double(), x.double(), noise.double(), table[7].expand(8, -1).double(), scale,
        3, kind, "epsilon", False,
    )  # fmt: skip
    for got, expected in zip(ours, exact, strict=True):
        assert relative_error(got, expected) <= FLOAT32


def test_cfg_step_in_a_cuda_graph() -> None:
    """One captured step serves all timesteps: the coefficients are read on the device."""
    output, x, noise = randn((8, 8, 32, 32), (8, 4, 32, 32), (8, 4, 32, 32))
    table = kernels.ddpm_coefficients(torch.linspace(0.999, 0.01, 50)).cuda()
    row, scale = table[0].clone(), torch.full((4,), 3.8, device="cuda")
    kernels.cfg_step(output, x, noise, row, scale=scale)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        sample, _ = kernels.cfg_step(output, x, noise, row, scale=scale)
    for i in (0, 17, 49):
        row.copy_(table[i])
        graph.replay()
        assert torch.equal(sample, kernels.cfg_step(output, x, noise, table[i], scale=scale)[0])
