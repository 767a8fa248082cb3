"""Transforms of torch.func and forward-mode derivatives, which need plain PyTorch; and offsets that are not
contiguous."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from mdt_fast import kernels
from tolerances import FLOAT32, relative_error

R = torch.randn
B, L, D = 2, 4, 8
Op = Callable[..., Any]


def _of_tokens() -> dict[str, tuple[Op, list[Tensor]]]:
    x, y, m = R(B, L, D), R(B, L, D), list(R(3, B, D))
    ids, places = torch.tensor([[0, 2], [1, 3]]), torch.tensor([[0, 2, 1, 3], [3, 0, 2, 1]])
    plain = kernels
    return {
        "ln_modulate": (plain.ln_modulate, [x, *m[1:]]),
        "gate_residual": (plain.gate_residual, [x, y, m[0]]),
        "gate_residual_ln_modulate": (plain.gate_residual_ln_modulate, [x, y, *m]),
        "ln_modulate_linear": (plain.ln_modulate_linear, [x, *m[1:], R(3, D), R(3)]),
        "activated": (
            partial(plain.gate_residual_ln_modulate_linear, gelu=True), [x, y, *m, R(3, D), R(3)]
        ),
        "bias_gelu": (plain.bias_gelu, [x, R(D)]),
        "gelu_linear": (plain.gelu_linear, [x, R(D), R(3, D), R(3)]),
        "gather_tokens": (lambda x: plain.gather_tokens(x, ids), [x]),
        "unmask_tokens": (
            lambda x, mask, pos: plain.unmask_tokens(x, mask, pos, places), [x[:, :2], R(1, 1, D), R(1, L, D)]
        ),
        "merge_tokens": (lambda x, y: plain.merge_tokens(x, y, places), [x, y[:, :2]]),
        "patch_embed": (plain.patch_embed, [R(B, 3, 4, 4), R(D, 3, 2, 2), R(D), R(1, 4, D)]),
        "rel_attention": (partial(plain.rel_attention, grid_size=2), [*R(3, B, 2, L, D), R(12, 2)]),
        "sum_rows": (plain.sum_rows, [x[0]]),
        "skip_linear": (plain.skip_linear, [x, y, R(3, 2 * D), R(3)]),
    }  # fmt: skip


NAMES = list(_of_tokens())
MODULATED = [name for name in NAMES if name.startswith(("ln", "gate", "activated", "bias"))]


def summed(op: Op, *args: Tensor) -> Tensor:
    out = op(*args)
    return sum((o * o).sum() for o in (out if isinstance(out, tuple) else (out,)))  # type: ignore[return-value]


@pytest.mark.parametrize("name", NAMES)
def test_gradients_of_torch_func(name: str) -> None:
    """The same as autograd's, for every argument."""
    torch.manual_seed(0)
    op, args = _of_tokens()[name]
    leaves = [a.clone().requires_grad_() for a in args]
    expected = torch.autograd.grad(summed(op, *leaves), leaves)
    found = torch.func.grad(partial(summed, op), argnums=tuple(range(len(args))))(*args)
    for ours, theirs in zip(found, expected, strict=True):
        assert relative_error(ours, theirs) <= FLOAT32


@pytest.mark.parametrize("name", [name for name in NAMES if name != "rel_attention"])  # PyTorch's has none
def test_derivatives_in_forward_mode(name: str) -> None:
    """The slope along a direction is the gradient's product with it."""
    torch.manual_seed(0)
    op, args = _of_tokens()[name]
    along = [torch.randn_like(a) for a in args]
    _, slope = torch.func.jvp(partial(summed, op), tuple(args), tuple(along))
    leaves = [a.clone().requires_grad_() for a in args]
    gradients = torch.autograd.grad(summed(op, *leaves), leaves)
    expected = sum((g * a).sum() for g, a in zip(gradients, along, strict=True))
    assert relative_error(slope, torch.as_tensor(expected)) <= 10 * FLOAT32


@pytest.mark.parametrize("dtypes", [(torch.float16, torch.float32), (torch.float32, torch.float64)], ids=str)
@pytest.mark.parametrize("name", MODULATED)
def test_results_have_the_dtype_of_x(name: str, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    """With modulations and biases in another dtype, under torch.func as without."""
    own, other = dtypes
    op, args = _of_tokens()[name]
    args = [
        a.to(other if a.shape == (B, D) or (name == "bias_gelu" and a.shape == (D,)) else own) for a in args
    ]
    found = torch.func.grad(partial(summed, op), argnums=tuple(range(len(args))))(*args)
    assert [g.dtype for g in found] == [a.dtype for a in args]
    several = torch.func.vmap(op)(*(torch.stack([a, a]) for a in args))
    expected = op(*args)
    for ours, plain in zip(*(r if isinstance(r, tuple) else (r,) for r in (several, expected)), strict=True):
        assert ours.dtype == plain.dtype == own
        assert relative_error(ours[0].double(), plain.double()) <= (0.02 if own == torch.float16 else FLOAT32)


RAGGED: dict[str, tuple[Op, int]] = {
    "ln_modulate": (kernels.ln_modulate, 0), "gate_residual": (kernels.gate_residual, 1),
    "gate_residual_ln_modulate": (kernels.gate_residual_ln_modulate, 1),
    "ln_modulate_linear": (kernels.ln_modulate_linear, 0),
}  # fmt: skip


@pytest.mark.parametrize("name", RAGGED)
def test_offsets_that_lie_apart(name: str) -> None:
    torch.manual_seed(0)
    op, gated = RAGGED[name]
    modulations = 1 if name == "gate_residual" else 2 + gated
    args = [*R(1 + gated, 5, D), *R(modulations, B, D), *([R(3, D)] if "linear" in name else [])]
    apart = torch.tensor([0, 9, 2, 9, 5, 9], dtype=torch.int32)[::2]
    results = []
    for offsets in (apart, apart.contiguous()):
        leaves = [a.clone().requires_grad_() for a in args]
        out = summed(partial(op, offsets=offsets), *leaves)
        results.append([out, *torch.autograd.grad(out, leaves)])
    assert all(torch.equal(a, e) for a, e in zip(*results, strict=True))


def _of_places() -> dict[str, tuple[Op, Tensor]]:
    """Ops as functions of the numbers that a CPU checks, and several of those."""
    x, ids, mask = R(B, L, D), torch.rand(3, B, L).argsort(dim=-1), R(1, 1, D)
    q, qkv, table = R(B, 2, L, D), R(B, L, 3, 2, D), R(12, 2)
    images, weight, bias = R(B, 3, 4, 4), R(D, 3, 2, 2), R(D)
    plain = kernels
    return {
        "gather_tokens": (lambda ids: plain.gather_tokens(x, ids, ids), ids),
        "merge_tokens": (lambda ids: plain.merge_tokens(x, x[:, :2], ids), ids),
        "unmask_tokens": (lambda ids: plain.unmask_tokens(x[:, :2], mask, x[:1], ids), ids),
        "q_pos": (lambda pos: plain.rel_attention(q, q, q, table, grid_size=2, q_pos=pos), ids),
        "pos": (lambda pos: plain.rel_attention_qkvpacked(qkv, table, grid_size=2, pos=pos), ids),
        "patch_embed": (lambda ids: plain.patch_embed(images, weight, bias, x[:1], ids), ids),
        "mask_plan": (lambda noise: plain.mask_plan(noise, 2), torch.rand(3, B, L)),
    }


@pytest.mark.parametrize("name", list(_of_places()))
def test_vmap_over_what_a_cpu_checks(name: str) -> None:
    torch.manual_seed(0)
    op, several = _of_places()[name]
    apart = [op(each) for each in several]
    found = torch.func.vmap(op)(several)
    if isinstance(found, Tensor):
        found, apart = [found], [[each] for each in apart]
    for i, ours in enumerate(found):
        assert relative_error(ours.double(), torch.stack([each[i] for each in apart]).double()) <= FLOAT32
    if not several.is_floating_point():  # also within another transform, which wraps its arguments once more
        fixed = R(3, 1).requires_grad_()
        torch.func.vmap(torch.func.grad(lambda f, each: f.sum() * op(each).sum()))(fixed, several)


def test_offsets_under_vmap_need_a_longest_sample() -> None:
    q, offsets = R(6, 2, D), torch.tensor([[0, 2, 6], [0, 3, 6]], dtype=torch.int32)
    with pytest.raises(
        ValueError, match="max_q: got None; with q_offsets it must be given on CUDA and under"
    ):
        torch.func.vmap(lambda each: kernels.rel_attention(q, q, q, q_offsets=each))(offsets)
    x, m = R(6, D), R(2, D)
    ours = torch.func.vmap(lambda each: kernels.ln_modulate(x, m, m, offsets=each))(offsets)
    apart = torch.stack([kernels.ln_modulate(x, m, m, offsets=each) for each in offsets])
    assert relative_error(ours, apart) <= FLOAT32
