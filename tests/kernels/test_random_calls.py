"""Ten thousand random calls of the ops: the right answer or a ``ValueError``, never anything else.

Half of the calls are right, half have one thing wrong. The right answer, gradients included, is that of the
room's ``reference.py`` in float64.
"""

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mdt_fast import kernels
from mdt_fast.kernels.backends import INTERPRETING
from tolerances import relative_error

CASES = 10_000
FLOAT32 = 1e-4
"""Looser than elsewhere: random calls include sums that nearly cancel and rows of a few numbers."""

Call = tuple[Callable[..., Any], dict[str, Any]]


def floats(*shape: int) -> Tensor:
    return torch.randn(shape)


def ids(B: int, K: int, L: int) -> Tensor:
    """K distinct numbers of 0..L-1 in each row."""
    return torch.rand(B, L).argsort(1)[:, :K].contiguous()


def offsets(r: random.Random, B: int, longest: int) -> Tensor:
    lengths = torch.tensor([0] + [r.randint(0, longest) for _ in range(B)])
    return lengths.cumsum(0).to(torch.int32)


def ln_modulate(r: random.Random) -> Call:
    B, L, D = r.randint(0, 3), r.randint(0, 5), r.randint(8, 40)
    args = {"x_BLD": floats(B, L, D), "shift_BD": floats(B, D), "scale_BD": floats(B, D)}
    if r.random() < 0.3:
        bounds = offsets(r, B, 4)
        args |= {"x_BLD": floats(int(bounds[-1]), D), "offsets": bounds}
    return kernels.ln_modulate, args


def gate_residual_ln_modulate(r: random.Random) -> Call:
    _, args = ln_modulate(r)
    args |= {"y_BLD": torch.randn_like(args["x_BLD"]), "gate_BD": torch.randn_like(args["scale_BD"])}
    return kernels.gate_residual_ln_modulate, args


def residual_ln_modulate_linear(r: random.Random) -> Call:
    _, args = ln_modulate(r)
    outputs, D = r.randint(1, 9), args["scale_BD"].shape[1]
    layer = {"weight_OD": floats(outputs, D), "bias_O": floats(outputs)}
    return kernels.residual_ln_modulate_linear, args | layer


def bias_gelu(r: random.Random) -> Call:
    F = r.randint(1, 30)
    shape = [r.randint(0, 4) for _ in range(r.randint(0, 3))]
    return kernels.bias_gelu, {"x": floats(*shape, F), "bias": floats(F)}


def gather_tokens(r: random.Random) -> Call:
    B, L, D = r.randint(0, 3), r.randint(1, 9), r.randint(1, 9)
    return kernels.gather_tokens, {"x_BLD": floats(B, L, D), "ids_BK": ids(B, r.randint(0, L), L)}


def unmask_tokens(r: random.Random) -> Call:
    B, L, D = r.randint(0, 3), r.randint(1, 9), r.randint(1, 9)
    args = {
        "x_BKD": floats(B, r.randint(0, L), D),
        "mask_token_11D": floats(1, 1, D),
        "pos_1LD": floats(1, L, D),
    }
    return kernels.unmask_tokens, args | {"ids_restore_BL": ids(B, L, L)}


def merge_tokens(r: random.Random) -> Call:
    B, L, D = r.randint(0, 3), r.randint(1, 9), r.randint(1, 9)
    args = {"x_BLD": floats(B, L, D), "computed_BND": floats(B, r.randint(0, L), D)}
    return kernels.merge_tokens, args | {"ids_restore_BL": ids(B, L, L)}


def patch_skip_linear(r: random.Random) -> Call:
    B, L, D, P, width = r.randint(0, 2), r.randint(1, 4), r.randint(1, 9), r.randint(1, 9), r.randint(1, 9)
    args = {"x_BLD": floats(B, L, D), "patches_BLP": floats(B, L, P), "embed_weight_DP": floats(D, P)}
    args |= {"embed_bias_D": floats(D), "pos_1LD": floats(1, L, D), "weight": floats(width, 2 * D)}
    return kernels.patch_skip_linear, args | {"bias": floats(width)}


def patch_embed(r: random.Random) -> Call:
    B, C, p, G, D = r.randint(0, 2), r.randint(1, 4), r.randint(1, 3), r.randint(1, 4), r.randint(1, 9)
    args = {"x_BCSS": floats(B, C, G * p, G * p), "weight_DCpp": floats(D, C, p, p)}
    if r.random() < 0.5:
        args["ids_BK"] = torch.randint(0, G * G, (B, r.randint(0, 5)))
    return kernels.patch_embed, args | {"bias_D": floats(D), "pos_1LD": floats(1, G * G, D)}


def skip_linear(r: random.Random) -> Call:
    B, L, D, width = r.randint(0, 2), r.randint(0, 4), r.randint(1, 9), r.randint(1, 9)
    args = {"x": floats(B, L, D), "skip": floats(B, L, D), "weight": floats(width, 2 * D)}
    return kernels.skip_linear, args | {"bias": floats(width)}


def rel_attention(r: random.Random) -> Call:
    B, H, G, d = r.randint(0, 2), r.randint(1, 3), r.randint(1, 4), r.randint(1, 20)
    M, N = (r.choice([G * G, r.randint(0, G * G)]) for _ in range(2))
    args: dict[str, Any] = {
        name: floats(B, H, n, d) for name, n in (("q_BHMd", M), ("k_BHNd", N), ("v_BHNd", N))
    }
    if r.random() < 0.2:
        return kernels.rel_attention, args
    args |= {"table_RH": floats((2 * G - 1) ** 2 + 3, H), "grid_size": G}
    for name, n in (("q_pos", M), ("k_pos", N)):
        if n != G * G or r.random() < 0.5:
            args[name] = ids(B, n, G * G)
    return kernels.rel_attention, args


def rel_attention_qkvpacked(r: random.Random) -> Call:
    B, H, G, d = r.randint(0, 3), r.randint(1, 2), r.randint(1, 4), r.randint(1, 20)
    args: dict[str, Any] = {"table_RH": floats((2 * G - 1) ** 2 + 3, H), "grid_size": G}
    bounds = offsets(r, B, G * G)
    pos = [ids(1, int(n), G * G)[0] for n in bounds.diff()]
    args |= {"offsets": bounds, "pos": torch.cat(pos) if pos else torch.zeros(0, dtype=torch.int64)}
    return kernels.rel_attention_qkvpacked, args | {"qkv_BL3Hd": floats(int(bounds[-1]), 3, H, d)}


MAKERS = (
    ln_modulate, gate_residual_ln_modulate, residual_ln_modulate_linear, bias_gelu, gather_tokens,
    unmask_tokens, merge_tokens, patch_embed, skip_linear, patch_skip_linear, rel_attention,
    rel_attention_qkvpacked,
)  # fmt: skip


def spoil(r: random.Random, args: dict[str, Any]) -> dict[str, Any]:
    """One argument changed: another shape, dtype or device, values out of range, or axes swapped."""
    args = dict(args)
    name = r.choice([key for key, value in args.items() if isinstance(value, Tensor)])
    x = args[name]
    how = r.randrange(7)
    if how == 0:
        x = x.unsqueeze(0)
    elif how == 1 and x.ndim:
        x = torch.cat([x, x[:1] if len(x) else x.new_zeros(1, *x.shape[1:])])
    elif how == 2 and x.ndim and x.shape[-1] > 1:
        x = x[..., :-1]
    elif how == 3:
        x = x.to(torch.complex64) if x.is_floating_point() else x.to(torch.int16)
    elif how == 4:
        x = x.to("meta")
    elif how == 5 and not x.is_floating_point():
        x = x - 1 if r.random() < 0.5 else x + 1000
    else:
        x = x.transpose(0, -1)
    args[name] = x
    return args


def run(op: Callable[..., Any], args: dict[str, Any], dtype: torch.dtype) -> list[Tensor]:
    leaves = {
        name: x.to(dtype).requires_grad_() if isinstance(x, Tensor) and x.dtype == torch.float32 else x
        for name, x in args.items()
    }
    outputs = op(**leaves)
    outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
    wanted = [x for x in leaves.values() if isinstance(x, Tensor) and x.requires_grad]
    loss = sum(o.square().sum() for o in outputs)
    return [*outputs, *torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True)]


@pytest.mark.slow
@pytest.mark.parametrize("part", range(10))
def test_right_or_refused(part: int) -> None:
    check(part, CASES // 10)


@pytest.mark.interpreter
@pytest.mark.skipif(not INTERPRETING, reason="needs TRITON_INTERPRET=1 in the environment")
def test_right_or_refused_by_the_kernels() -> None:
    check(99, 400)


def check(seed: int, cases: int) -> None:
    r = random.Random(seed)
    torch.manual_seed(seed)
    refused = 0
    for case in range(cases):
        op, args = r.choice(MAKERS)(r)
        spoilt = r.random() < 0.5
        if spoilt:
            args = spoil(r, args)
        shown = {k: [*v.shape, v.dtype, v.device] if isinstance(v, Tensor) else v for k, v in args.items()}
        try:
            ours = run(op, args, torch.float32)
        except ValueError as error:
            if not spoilt or "\n" in str(error):
                raise AssertionError(f"{case}: {op.__name__}({shown}) was refused") from error
            refused += 1
            continue
        except Exception as error:
            raise AssertionError(f"{case}: {op.__name__}({shown})") from error
        if any(x.device.type == "meta" for x in ours):
            continue
        exact = run(op, args, torch.float64)
        for a, e in zip(ours, exact, strict=True):
            assert a.isfinite().all(), f"{case}: {op.__name__}({shown})"
            assert relative_error(a, e) <= FLOAT32 or (a - e).abs().max() <= FLOAT32, (
                f"{case}: {op.__name__}({shown})"
            )
    assert refused > cases // 4
