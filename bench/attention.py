"""Time attention with a relative position bias, for every available backend, against attention without bias.

    python bench/attention.py                      on a CPU the smallest sizes, in under a minute
    python bench/attention.py --tokens 64,256,1024,4096 --head-dim 64,72 --heads 16 --json rows.jsonl

The roof is ``sdpa-no-bias``: PyTorch's own attention (its flash attention for half types on a GPU) over the
same queries, keys and values, without any bias. ``triton-FORM-GRADIENT`` names the form in which our kernels
take the bias and the way they compute the table's gradient, two options each
(kernels/rel_attention/config.py); ``triton-packed`` takes q, k and v in one tensor. The masked case keeps 153
of 256 tokens and passes their positions.

B: samples, H: heads, L: tokens of a grid, M: tokens kept (L without a mask), d: head size.
"""

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence
from functools import partial
from math import isqrt
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import command
import plots
import points
from mdt_fast.errors import UserError
from mdt_fast.kernels import rel_attention, rel_attention_qkvpacked
from ops import KEPT, TOKENS, Maker, not_interpreted
from providers import Skip
from rows import RowFile, machine

ROOF = "sdpa-no-bias"
FORMS = ("lookup", "dense")
TABLE_GRADS = ("recompute", "store")
TRITON = tuple(f"triton-{form}-{gradient}" for form in FORMS for gradient in TABLE_GRADS)
PROVIDERS = (ROOF, "sdpa", "flex", "xformers", "flash_attn", *TRITON, "triton-packed")

GPU_TOKENS = 8192
"""Total tokens of a batch on a GPU, by which its default batch size is set."""
MEMORY_SHARE = 0.5
BIASES = 8
"""The most float32 tensors of the scores' size that a materialised bias and its gradient take at once."""

TIME_LIMITS = {"cpu": 50.0, "cuda": 225.0}
DEFAULTS = {
    "cpu": {"tokens": "64", "head_dim": "64,72", "heads": "2,6"},
    "cuda": {"tokens": "256,64,1024,4096", "head_dim": "64,72", "heads": "16"},
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark. Returns 0; 1 if nothing was measured; 2 after a user error; 130 after Ctrl-C."""
    argv = list(sys.argv[1:] if argv is None else argv)
    return command.guarded("attention", lambda kept: _main(argv, kept))


def _main(argv: list[str], kept: command.Kept) -> int:
    args = _parser().parse_args(argv)
    request = points.Request(args, PROVIDERS, time_limits=TIME_LIMITS)
    chosen = choose(args, request)
    line = shlex.join(["python", "bench/attention.py", *argv])
    kept.rows = rows = RowFile(args.json, machine(request.device, line))
    if args.plot is not None:
        plots.check_target(args.plot)
    if request.device.type == "cpu" and args.tokens is None:
        print("64 tokens, batch 2: the smallest sizes, as this is a CPU (--tokens 256 --heads 16 for more)")
    measured = points.measure(chosen, request, rows)
    command.conclude(rows, args.plot, plots.draw_attention)
    return 0 if measured else 1


def choose(args: argparse.Namespace, request: points.Request) -> list[points.Point]:
    """The requested points, with the device's defaults for whatever was not given."""
    default = DEFAULTS[request.device.type]

    def numbers(option: str, given: str | None) -> list[int]:
        texts = command.listed(option, given or default[option[2:].replace("-", "_")])
        return [command.whole(option, text) for text in texts]

    lengths = numbers("--tokens", args.tokens)
    for L in lengths:
        if isqrt(L) ** 2 != L:
            raise UserError(f"--tokens: got {L}, expected squares (64, 256, 1024, 4096): a whole grid")
    masks = command.names("--masked", args.masked or "no,yes", ("no", "yes"))
    cases = [(L, None) for L in lengths if "no" in masks]
    if "yes" in masks:
        L = TOKENS if TOKENS in lengths else min(lengths)
        cases.insert(1, (L, max(1, round(L * KEPT / TOKENS))))
    batch = None if args.batch is None else command.whole("--batch", args.batch)
    return [
        point(mode, dtype, sizes)
        for dtype in request.dtypes
        for L, kept in cases
        for H in numbers("--heads", args.heads)
        for d in numbers("--head-dim", args.head_dim)
        for sizes in [_sizes(request.device, batch, H, L, kept, d)]
        for mode in request.modes
        if mode == "fwd" or fits(request.device, sizes, dtype)
    ]


def _sizes(
    device: torch.device, batch: int | None, H: int, L: int, kept: int | None, d: int
) -> dict[str, int]:
    B = batch or (2 if device.type == "cpu" else max(1, GPU_TOKENS // L))
    return {"B": B, "H": H, "L": L, **({} if kept is None else {"K": kept}), "d": d}


def fits(device: torch.device, shape: dict[str, int], dtype: torch.dtype) -> bool:
    """Whether a materialised bias and its gradient fit into memory. Prints a line if they might not."""
    if device.type == "cpu":
        return True
    scores = shape["B"] * shape["H"] * shape.get("K", shape["L"]) ** 2
    free, _ = torch.cuda.mem_get_info(device)
    if BIASES * scores * 4 <= MEMORY_SHARE * free:
        return True
    print(f"{shape['L']} tokens, {dtype}: forward only; gradients of a materialised bias might not fit")
    return False


def point(mode: points.Mode, dtype: torch.dtype, shape: dict[str, int]) -> points.Point:
    """A point for ``shape``: B, H, L, d and, with a mask, K. FLOPs: 4 B H M M d forward, 2.5 times as many
    backward."""
    M = shape.get("K", shape["L"])
    flops = 4 * shape["B"] * shape["H"] * M * M * shape["d"]
    return points.Point(
        bench="attention", op="rel_attention", mode=mode, shape=shape, dtype=dtype,
        prepare=partial(prepare, mode, dtype, shape), base=ROOF, oracle="sdpa", unlike=frozenset([ROOF]),
        flops=flops if mode == "fwd" else flops * 7 // 2,
        switches={
            name: dict(zip(("bias_form", "table_grad"), name.split("-")[1:])) for name in TRITON
        },
    )  # fmt: skip


def prepare(
    mode: points.Mode, dtype: torch.dtype, shape: dict[str, int], device: torch.device
) -> dict[str, Callable[[], points.Call]]:
    """All providers on the same inputs: q, k, v as [B, H, M, d] views of rows [B, M, H, d], the layout that a
    linear layer produces; the table in float32, as a master weight; and the positions of the kept tokens."""
    B, H, L, d = (shape[name] for name in "BHLd")
    M, G, make = shape.get("K", L), isqrt(L), Maker(device, dtype)
    qkv = make.normal(B, M, 3, H, d, grad=False)
    q, k, v = (x.contiguous().transpose(1, 2).requires_grad_() for x in qkv.unbind(2))
    table = Maker(device, torch.float32).normal((2 * G - 1) ** 2 + 3, H, std=0.5)
    pos = make.plan(B, L, M).ids_keep if "K" in shape else None

    def serve(backend: str, **forms: Any) -> points.Call:
        function = partial(
            rel_attention, grid_size=G, q_pos=pos, k_pos=pos, attention_backend=backend, **forms
        )
        return _unless_refused(points.call_of(mode, function, (q, k, v, table)))

    def triton(form: str, gradient: str) -> points.Call:
        if mode == "fwd" and gradient != TABLE_GRADS[0]:
            raise Skip(f"the forward pass is that of triton-{form}-{TABLE_GRADS[0]}")
        not_interpreted()
        return serve("triton", bias_form=form, table_grad=gradient)

    def packed() -> points.Call:
        not_interpreted()
        options = {"grid_size": G, "pos": pos, "attention_backend": "triton"}

        def attend(qkv_BM3Hd: Tensor, table_RH: Tensor) -> Tensor:
            return rel_attention_qkvpacked(qkv_BM3Hd, table_RH, **options).transpose(1, 2)

        call = points.call_of(mode, attend, (qkv.clone().requires_grad_(), table))
        return _apart(_unless_refused(call))

    return {
        ROOF: lambda: points.call_of(mode, partial(_without_bias, dtype), (q, k, v)),
        **{name: partial(serve, name) for name in ("sdpa", "flex", "xformers", "flash_attn")},
        **{name: partial(triton, *name.split("-")[1:]) for name in TRITON},
        "triton-packed": packed,
    }


def _without_bias(dtype: torch.dtype, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    if q.is_cuda and dtype != torch.float32:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return F.scaled_dot_product_attention(q, k, v)
    return F.scaled_dot_product_attention(q, k, v)


def _unless_refused(call: points.Call) -> points.Call:
    """``call``, run once to check that its backend can serve it. Raises ``Skip`` with the reason if not."""
    try:
        call()
    except ValueError as error:
        what, refused, reason = str(error).partition(" cannot serve this call: ")
        if refused and what.startswith("attention_backend: "):
            raise Skip(reason) from None
        raise
    return call


def _apart(call: points.Call) -> points.Call:
    """Split the packed gradient into those of q, k and v, as the other providers return them (views only)."""

    def apart() -> list[Tensor]:
        output, *gradients = call()
        if not gradients:
            return [output]
        dqkv_BM3Hd, dtable_RH = gradients
        return [output, *(x.transpose(1, 2) for x in dqkv_BM3Hd.unbind(2)), dtable_RH]

    return apart


def _parser() -> command.Parser:
    parser = command.Parser(prog="attention", description="Attention with a relative position bias.")
    parser.add_argument("--tokens", help="lengths, comma-separated (default: 64,256,1024,4096; on a CPU 64)")
    parser.add_argument("--head-dim", help="head sizes, comma-separated (default: 64,72)")
    parser.add_argument("--heads", help="numbers of heads, comma-separated (default: 16; on a CPU 2,6)")
    parser.add_argument("--batch", help=f"batch size (default: {GPU_TOKENS} tokens in total; on a CPU 2)")
    parser.add_argument("--masked", help="no, yes or both, comma-separated (default: no,yes)")
    points.add_options(parser, PROVIDERS)
    command.add_output_options(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
