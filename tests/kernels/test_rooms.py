"""Every kernel room: forward and all gradients against formulas in float64, odd shapes, and wrong arguments.

B samples, L tokens, K kept, D width, H heads, M queries, N keys, d head size, G grid side.
"""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mdt_fast import kernels
from mdt_fast.kernels import checks
from mdt_fast.masking import MaskPlan
from mdt_fast.reference.layers import relative_position_index
from tolerances import FLOAT32, FLOAT64, relative_error

TOLERANCE = {torch.float64: FLOAT64, torch.float32: FLOAT32}


def test_only_an_export_is_one() -> None:
    """In torch 2.11 ``torch.compiler.is_exporting`` is true for a compilation, too."""

    class Model(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + checks.exporting()

    zero = torch.zeros(1)
    assert Model()(zero) == torch.compile(Model(), backend="eager", fullgraph=True)(zero) == 0
    assert torch.export.export(Model(), (zero,)).module()(zero) == 1
    assert not checks.exporting()


def layer_norm(x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def formula_ln_modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return layer_norm(x) * (1 + scale[:, None]) + shift[:, None]


def formula_gate(x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    residual = x + gate[:, None] * y
    return residual, formula_ln_modulate(residual, shift, scale)


def formula_bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    z = x + bias
    return 0.5 * z * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))


def formula_skip_linear(x: Tensor, skip: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.cat([x, skip], dim=-1) @ weight.t() + bias


def formula_patch_embed(x: Tensor, weight: Tensor, bias: Tensor, pos: Tensor) -> Tensor:
    p = weight.shape[-1]
    return torch.nn.functional.conv2d(x, weight, bias, stride=p).flatten(2).transpose(1, 2) + pos


def check(
    op: Callable[..., Any], formula: Callable[..., Any], args: list[Tensor], dtype: torch.dtype
) -> None:
    """Compare outputs, and the gradients of a random projection of them for every argument."""
    exact = [a.double().requires_grad_() for a in args]
    given_ = [a.to(dtype).requires_grad_() for a in args]
    expected, actual = formula(*exact), op(*given_)
    expected = expected if isinstance(expected, tuple) else (expected,)
    actual = actual if isinstance(actual, tuple) else (actual,)
    loss_expected = loss_actual = torch.zeros(())
    for e, a in zip(expected, actual, strict=True):
        assert a.dtype == dtype
        assert relative_error(a, e) < TOLERANCE[dtype]
        w = torch.randn_like(e)
        loss_expected = loss_expected + (e * w).sum()
        loss_actual = loss_actual + (a * w.to(dtype)).sum()
    for e, a in zip(_grads(loss_expected, exact), _grads(loss_actual, given_), strict=True):
        assert relative_error(a, e) < TOLERANCE[dtype]


def _grads(loss: Tensor, args: list[Tensor]) -> tuple[Tensor, ...]:
    """Gradients, with zeros for arguments that an empty set of tokens leaves out."""
    return torch.autograd.grad(loss, args, allow_unused=True, materialize_grads=True)


DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
SHAPES = pytest.mark.parametrize(("B", "L", "D"), [(1, 1, 4), (2, 7, 24), (3, 65, 72), (2, 33, 384)])


@DTYPES
@SHAPES
def test_ln_modulate(B: int, L: int, D: int, dtype: torch.dtype) -> None:
    x, m = torch.randn(B, L, D), torch.randn(2, B, D)
    check(kernels.ln_modulate, formula_ln_modulate, [x, m[0], m[1]], dtype)


@DTYPES
@SHAPES
def test_gate_residual_ln_modulate(B: int, L: int, D: int, dtype: torch.dtype) -> None:
    x, m = torch.randn(2, B, L, D), torch.randn(3, B, D)
    check(kernels.gate_residual_ln_modulate, formula_gate, [*x, *m], dtype)


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_ragged_samples_are_as_if_alone(gated: bool) -> None:
    offsets, m = torch.tensor([0, 4, 4, 9], dtype=torch.int32), torch.randn(3, 3, 24)
    x, y = torch.randn(2, 9, 24)
    for b, (start, end) in enumerate(offsets.unfold(0, 2, 1).tolist()):
        one = [part[None, start:end] for part in (x, y)]
        if gated:
            whole = kernels.gate_residual_ln_modulate(x, y, *m, offsets=offsets)
            alone = kernels.gate_residual_ln_modulate(*one, *m[:, b : b + 1])
        else:
            whole = (kernels.ln_modulate(x, *m[1:], offsets=offsets),)
            alone = (kernels.ln_modulate(one[0], *m[1:, b : b + 1]),)
        for w, a in zip(whole, alone, strict=True):
            assert relative_error(w[start:end], a[0]) < FLOAT32


@DTYPES
@SHAPES
def test_bias_gelu(B: int, L: int, D: int, dtype: torch.dtype) -> None:
    check(kernels.bias_gelu, formula_bias_gelu, [3 * torch.randn(B, L, D), torch.randn(D)], dtype)


@DTYPES
@SHAPES
def test_skip_linear(B: int, L: int, D: int, dtype: torch.dtype) -> None:
    x, weight = torch.randn(2, B, L, D), torch.randn(D, 2 * D) / D**0.5
    check(kernels.skip_linear, formula_skip_linear, [*x, weight, torch.randn(D)], dtype)


@DTYPES
@pytest.mark.parametrize(
    ("B", "C", "p", "G", "D"), [(2, 4, 2, 4, 12), (1, 3, 4, 3, 20), (3, 1, 1, 5, 8), (1, 4, 8, 1, 4)]
)
def test_patch_embed(B: int, C: int, p: int, G: int, D: int, dtype: torch.dtype) -> None:
    args = [
        torch.randn(B, C, G * p, G * p),
        torch.randn(D, C, p, p),
        torch.randn(D),
        torch.randn(1, G * G, D),
    ]
    check(kernels.patch_embed, formula_patch_embed, args, dtype)


@DTYPES
@pytest.mark.parametrize(("L", "K"), [(16, 5), (16, 0), (16, 16), (9, 1), (64, 33)])
def test_tokens(L: int, K: int, dtype: torch.dtype) -> None:
    B, D = 3, 12
    plan = MaskPlan.from_noise(torch.rand(B, L), K)

    def gather(x: Tensor) -> Tensor:
        return torch.stack([row[ids] for row, ids in zip(x, plan.ids_keep, strict=True)])

    def unmask(x: Tensor, token: Tensor, pos: Tensor) -> Tensor:
        rows = []
        for b in range(B):
            kept = dict(zip(plan.ids_keep[b].tolist(), x[b], strict=True))
            rows.append(torch.stack([kept.get(i, token[0, 0]) for i in range(L)]))
        return torch.stack(rows) + pos

    check(lambda x: kernels.gather_tokens(x, plan.ids_keep), gather, [torch.randn(B, L, D)], dtype)
    args = [torch.randn(B, K, D), torch.randn(1, 1, D), torch.randn(1, L, D)]
    check(lambda x, m, pos: kernels.unmask_tokens(x, m, pos, plan.ids_restore), unmask, args, dtype)


@DTYPES
@pytest.mark.parametrize("positions", ["grid", "kept", "queries apart"])
@pytest.mark.parametrize(("G", "H", "d"), [(1, 1, 16), (3, 2, 64), (4, 3, 72), (7, 1, 20)])
def test_rel_attention(G: int, H: int, d: int, positions: str, dtype: torch.dtype) -> None:
    B, L = 2, G * G
    plan = MaskPlan.from_noise(torch.rand(B, L), max(1, L // 2)).sorted()
    q_pos = k_pos = plan.ids_keep if positions == "kept" else None
    if positions == "queries apart":
        q_pos, k_pos = plan.ids_mask, None
    M = L if q_pos is None else q_pos.shape[1]
    N = L if k_pos is None else k_pos.shape[1]
    index, every = relative_position_index(G, G), torch.arange(L).expand(B, L)

    def formula(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
        rows = []
        for b in range(B):
            i, j = (every if q_pos is None else q_pos)[b], (every if k_pos is None else k_pos)[b]
            bias = table[index[i][:, j]].permute(2, 0, 1)
            rows.append((q[b] @ k[b].transpose(-2, -1) / d**0.5 + bias).softmax(-1) @ v[b])
        return torch.stack(rows)

    def op(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
        return kernels.rel_attention(q, k, v, table, grid_size=G, q_pos=q_pos, k_pos=k_pos)

    args = [torch.randn(B, H, M, d), torch.randn(B, H, N, d), torch.randn(B, H, N, d)]
    args.append(torch.randn((2 * G - 1) ** 2 + 3, H))
    check(op, formula, args, dtype)


def test_rel_attention_without_a_table() -> None:
    q, k, v = torch.randn(3, 2, 3, 5, 8)
    expected = (q @ k.transpose(-2, -1) / 8**0.5).softmax(-1) @ v
    assert relative_error(kernels.rel_attention(q, k, v), expected) < FLOAT32


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 4), st.integers(0, 40), st.integers(1, 9), st.integers(0, 2**31))
def test_random_plans(B: int, L: int, D: int, seed: int) -> None:
    """Gather, then unmask, puts kept tokens back in place and the mask token everywhere else."""
    generator = torch.Generator().manual_seed(seed)
    K = int(torch.randint(0, L + 1, (), generator=generator))
    plan = MaskPlan.from_noise(torch.rand(B, L, generator=generator), K)
    for p in (plan, plan.sorted()):
        x, token = torch.randn(B, L, D, generator=generator), torch.randn(1, 1, D, generator=generator)
        back = kernels.unmask_tokens(
            kernels.gather_tokens(x, p.ids_keep), token, torch.zeros(1, L, D), p.ids_restore
        )
        assert torch.equal(back, torch.where(p.mask[:, :, None] > 0, token, x))
        assert p.mask.sum() == B * (L - K)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_half_types_stay_finite_and_close(dtype: torch.dtype) -> None:
    x, m = torch.randn(2, 33, 64), torch.randn(2, 2, 64)
    exact = formula_ln_modulate(x.to(dtype).double(), m[0].to(dtype).double(), m[1].to(dtype).double())
    plain = formula_ln_modulate(x.to(dtype), m[0].to(dtype), m[1].to(dtype))
    ours = kernels.ln_modulate(x.to(dtype), m[0].to(dtype), m[1].to(dtype))
    assert ours.dtype == dtype
    assert relative_error(ours, exact) <= 2 * max(relative_error(plain, exact), torch.finfo(dtype).eps)


def wrong() -> list[tuple[str, Callable[[], Any], str]]:
    x, m, ids = torch.randn(2, 5, 8), torch.randn(2, 8), torch.zeros(2, 3, dtype=torch.int64)
    q, table = torch.randn(2, 2, 4, 8), torch.randn(12, 2)
    image, weight = torch.randn(2, 4, 6, 6), torch.randn(8, 4, 2, 2)
    k = kernels
    return [
        ("ln shift", lambda: k.ln_modulate(x, m[:1], m), r"shift: shape \[1, 8\], expected \[2, 8\]"),
        ("ln x rank", lambda: k.ln_modulate(x[0], m, m), r"x: shape \[5, 8\], expected \[B, L, D\]"),
        ("ln x dtype", lambda: k.ln_modulate(x.long(), m, m), r"x: dtype torch.int64"),
        (
            "ln offsets",
            lambda: k.ln_modulate(x[0], m, m, offsets=torch.tensor([0, 2, 4], dtype=torch.int32)),
            r"offsets: runs from 0 to 4, expected 0 to 5",
        ),
        (
            "ln offsets order",
            lambda: k.ln_modulate(x[0], m, m, offsets=torch.tensor([0, 6, 5], dtype=torch.int32)),
            r"offsets: is not ascending",
        ),
        (
            "ln offsets dtype",
            lambda: k.ln_modulate(x[0], m, m, offsets=torch.tensor([0, 2, 5])),
            r"offsets: torch.int64 \[3\] on cpu, expected torch.int32",
        ),
        ("gate y", lambda: k.gate_residual_ln_modulate(x, x[:, :4], m, m, m), r"y: shape \[2, 4, 8\]"),
        ("gelu bias", lambda: k.bias_gelu(x, m), r"bias: shape \[2, 8\], expected \[8\]"),
        ("skip weight", lambda: k.skip_linear(x, x, m, m[0]), r"weight: shape \[2, 8\], expected \[O, 16\]"),
        ("gather dtype", lambda: k.gather_tokens(x, ids.int()), r"ids: dtype torch.int32"),
        ("gather high", lambda: k.gather_tokens(x, ids + 5), r"ids: values 5..5, expected 0..4"),
        ("gather low", lambda: k.gather_tokens(x, ids - 1), r"ids: values -1..-1"),
        ("gather batch", lambda: k.gather_tokens(x, ids[:1]), r"ids: shape \[1, 3\], expected \[2, K\]"),
        ("unmask more", lambda: k.unmask_tokens(x, m[:1, None], x[:1], ids), r"x: 5 kept tokens, .* only 3"),
        (
            "patch odd",
            lambda: k.patch_embed(image[:, :, :5, :5], weight, m[0], x[:1]),
            r"side 5 does not divide",
        ),
        (
            "patch channels",
            lambda: k.patch_embed(image[:, :3], weight, m[0], x[:1]),
            r"x: shape \[2, 3, 6, 6\]",
        ),
        (
            "patch pos",
            lambda: k.patch_embed(image, weight, m[0], x[:1]),
            r"pos: shape \[1, 5, 8\], expected \[1, 9",
        ),
        ("attention k", lambda: k.rel_attention(q, q[..., :4], q), r"k: shape"),
        ("attention dtype", lambda: k.rel_attention(q, q.double(), q), r"k: torch.float64 on cpu, but q is"),
        (
            "attention table",
            lambda: k.rel_attention(q, q, q, table[:9], grid_size=2),
            r"table: shape \[9, 2\]",
        ),
        (
            "attention table elsewhere",
            lambda: k.rel_attention(q, q, q, table.to("meta"), grid_size=2),
            r"table: torch.float32 on meta, expected floating-point on cpu",
        ),
        ("attention grid", lambda: k.rel_attention(q, q, q, table), r"grid_size: got 0"),
        (
            "attention pos",
            lambda: k.rel_attention(q[:, :, :3], q, q, table, grid_size=2),
            r"q_pos: needed for 3",
        ),
        (
            "attention off grid",
            lambda: k.rel_attention(q[:, :, :3], q, q, table, grid_size=2, q_pos=ids + 4),
            r"q_pos: values 4..4, expected 0..3",
        ),
    ]


@pytest.mark.parametrize(("call", "message"), [pytest.param(c, m, id=i) for i, c, m in wrong()])
def test_wrong_arguments(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_every_op_has_a_backend() -> None:
    rows = kernels.backends()
    no_ops = {
        "Backend",
        "MaskIds",
        "attention_backends",
        "backends",
        "relative_bias",
        "ddim_coefficients",
        "ddpm_coefficients",
        "grad_norm",
    }
    assert {row.op for row in rows} == set(kernels.__all__) - no_ops
    assert all(row.backend and row.reason for row in rows)
