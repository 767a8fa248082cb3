"""What several ops refuse alike: non-tensors, float8, zero width; and torch.func, which they support."""

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mdt_fast import kernels
from tolerances import FLOAT32, relative_error

R = torch.randn
F8 = R(2, 3, 4).to(torch.float8_e4m3fn)
WIDTH = "x: width 0, expected 1 or more"
FLOATS = "x: dtype torch.float8_e4m3fn, expected float16, bfloat16, float32 or float64"
REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "a list": (lambda: kernels.bias_gelu([1.0], R(1)), "x: got list, expected a tensor"),  # type: ignore[arg-type]
    "no bias": (
        lambda: kernels.bias_gelu(R(2, 3), None), "bias: got NoneType, expected a tensor"  # type: ignore[arg-type]
    ),
    "no skip's bias": (
        lambda: kernels.skip_linear(R(3, 2), R(3, 2), R(5, 4), None),  # type: ignore[arg-type]
        "bias: got NoneType, expected a tensor",
    ),
    **{
        f"no row for {name}": (call, "x: shape [], expected [..., D]")
        for name, call in {
            "linear": lambda: kernels.linear(R(()), R(2, 3)),
            "bias_gelu": lambda: kernels.bias_gelu(R(()), R(3)),
            "gelu_linear": lambda: kernels.gelu_linear(R(()), R(3), R(2, 3)),
            "skip_linear": lambda: kernels.skip_linear(R(()), R(()), R(2, 6), R(2)),
        }.items()
    },
    "a weight on another device": (
        lambda: kernels.linear(R(3, 4), R(2, 4, device="meta")),
        "weight: torch.float32 on meta, expected floating-point on cpu",
    ),
    "a weight of three sizes": (
        lambda: kernels.linear(R(3, 4), R(4, 4, 4)), "weight: shape [4, 4, 4], expected [O, 4]"
    ),
    "a wrong weight before a wrong bias": (
        lambda: kernels.linear(R(3, 4), R(2, 4).double(), R(0)),
        "weight: torch.float64 on cpu, but x is torch.float32 on cpu",
    ),
    "four sizes": (
        lambda: kernels.ln_modulate(R(2, 3, 5, 4), *R(2, 2, 4)), "x: shape [2, 3, 5, 4], expected [B, L, D]"
    ),
    "no value beside query and key": (
        lambda: kernels.rel_attention_qkvpacked(R(2, 4, 2, 2, 8)),
        "qkv: shape [2, 4, 2, 2, 8], expected [B, L, 3, H, d]",
    ),
    "float8 rows": (lambda: kernels.sum_rows(F8[0]), FLOATS),
    "float8 norm": (lambda: kernels.ln_modulate(F8, R(2, 4), R(2, 4)), FLOATS),
    "no width": (lambda: kernels.ln_modulate(R(2, 3, 0), R(2, 0), R(2, 0)), WIDTH),
    "no width before a layer": (
        lambda: kernels.ln_modulate_linear(R(2, 3, 0), R(2, 0), R(2, 0), R(4, 0), R(4)), WIDTH
    ),
    "no width, gated": (
        lambda: kernels.gate_residual_ln_modulate(R(2, 3, 0), R(2, 3, 0), *R(3, 2, 0)), WIDTH
    ),
    "no head size": (
        lambda: kernels.rel_attention_qkvpacked(R(2, 4, 3, 2, 0)), "q: head size 0, expected 1 or more"
    ),
    "eps that is no number": (
        lambda: kernels.ln_modulate(R(2, 3, 4), R(2, 4), R(2, 4), eps=float("nan")),
        "eps: got nan, expected finite numbers of 0 or more",
    ),
    "noise in lists": (lambda: kernels.mask_plan([[0.1]], 1), "noise: got list, expected a tensor"),  # type: ignore[arg-type]
    "no output": (
        lambda: kernels.cfg_step(None, R(1, 4, 2), None, R(7)),  # type: ignore[arg-type]
        "output: got NoneType, expected a tensor",
    ),
    "no coefficients": (
        lambda: kernels.cfg_step(R(1, 8, 2), R(1, 4, 2), None, None),  # type: ignore[arg-type]
        "coefficients: got NoneType, expected a tensor",
    ),
    "guidance beyond every float": (
        lambda: kernels.cfg_step(R(2, 8, 2), R(1, 4, 2), None, R(7), scale=10**400),
        "scale: got int, expected a number or a tensor [1]",
    ),
    "no weight for patches": (
        lambda: kernels.patch_embed(R(1, 3, 4, 4), None, None, None),  # type: ignore[arg-type]
        "weight: got NoneType, expected a tensor",
    ),
    "a length in letters": (
        lambda: kernels.rel_attention(*R(3, 4, 2, 8), q_offsets=torch.tensor([0, 4]).int(), max_q="4"),  # type: ignore[arg-type]
        "max_q: got '4'; with q_offsets it must be given",
    ),
    "FlexAttention under vmap": (
        lambda: torch.func.vmap(lambda q: kernels.rel_attention(q, q, q, attention_backend="flex"))(
            R(3, 1, 2, 4, 8)
        ),
        "attention_backend: 'flex' cannot serve this call: it cannot be transformed by torch.func",
    ),
    "eps beyond every float": (
        lambda: kernels.ln_modulate(R(2, 3, 4), R(2, 4), R(2, 4), eps=10**400), "eps: got 1000"
    ),
    "guidance by an array": (
        lambda: kernels.cfg_step(R(2, 8, 2), R(1, 4, 2), R(1, 4, 2), R(12), scale=np.ones(1)),  # type: ignore[arg-type]
        "scale: got ndarray, expected a number or a tensor [1]",
    ),
    "coefficients that are learnt": (
        lambda: kernels.cfg_step(R(1, 8, 2), R(1, 4, 2), R(1, 4, 2), R(12).requires_grad_()),
        "coefficients: needs a gradient",
    ),
    "no grid": (
        lambda: kernels.rel_attention(*R(3, 1, 2, 4, 8), R(12, 2), grid_size=None),  # type: ignore[arg-type]
        "grid_size: got None, a table needs an integer from 1 to",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_refused(what: str) -> None:
    call, message = REFUSED[what]
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


def test_skips_under_vmap_over_any_argument() -> None:
    B, L, D, P, O = 2, 5, 6, 3, 4  # noqa: E741
    ops: list[tuple[Callable[..., Tensor], list[Tensor]]] = [
        (kernels.skip_linear, [R(B, L, D), R(B, L, D), R(O, 2 * D), R(O)]),
        (
            kernels.patch_skip_linear,
            [R(B, L, D), R(B, L, P), R(D, P), R(D), R(1, L, D), R(O, 2 * D), R(O)],
        ),
    ]
    for op, args in ops:
        for i, arg in enumerate(args):
            several = torch.stack([arg, 2 * arg])
            dims = tuple(0 if j == i else None for j in range(len(args)))
            ours = torch.func.vmap(op, in_dims=dims)(*(several if j == i else a for j, a in enumerate(args)))
            one_by_one = [op(*(x if j == i else a for j, a in enumerate(args))) for x in several]
            assert relative_error(ours, torch.stack(one_by_one)) <= FLOAT32


@pytest.mark.parametrize("double", ["x", "weight"])
def test_float64_under_autocast_is_named(double: str) -> None:
    args = {"x": R(1, 3, 4, 4), "weight": R(8, 3, 2, 2)}
    args[double] = args[double].double()
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match=r"weight: torch\.float"):
        kernels.patch_embed(args["x"], args["weight"], R(8), R(1, 4, 8))


def test_no_width_before_an_activation() -> None:
    assert kernels.bias_gelu(R(2, 3, 0), R(0)).shape == (2, 3, 0)
    assert kernels.gelu_linear(R(2, 3, 0), R(0), R(4, 0), R(4)).shape == (2, 3, 4)


@pytest.mark.parametrize("own", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("auto", [torch.float16, torch.bfloat16], ids=str)
def test_tokens_move_under_autocast_in_either_half_type(auto: torch.dtype, own: torch.dtype) -> None:
    x, computed = R(2, 4, 8).to(own).requires_grad_(), R(2, 2, 8).to(own)
    ids = torch.tensor([[0, 2, 1, 3], [3, 0, 2, 1]])

    def both() -> list[Tensor]:
        unmasked = kernels.unmask_tokens(x[:, :2], R(1, 1, 8) * 0, R(1, 4, 8) * 0, ids)
        return [kernels.merge_tokens(x, computed, ids), unmasked]

    expected = both()
    with torch.autocast("cpu", auto):
        moved = both()
        compiled = torch.compile(both, fullgraph=True, backend="aot_eager")()
    for ours, theirs, plain in zip(moved, compiled, expected, strict=True):
        assert ours.dtype == theirs.dtype == own
        assert torch.equal(ours, plain)
        assert torch.equal(theirs, plain)
    torch.autograd.grad(moved[0].sum(), x)
