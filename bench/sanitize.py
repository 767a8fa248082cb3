"""Run every kernel once, forward and backward, at small odd shapes, optionally under compute-sanitizer.

    python bench/sanitize.py --tool memcheck       on a GPU: out-of-bounds and misaligned accesses, leaks
    python bench/sanitize.py --tool racecheck      on a GPU: races between threads for shared memory
    python bench/sanitize.py                       the calls alone: do they reach every kernel?

On a CPU the kernels of ``csrc/`` run as C++; Triton's run in the interpreter if TRITON_INTERPRET=1.

B: samples, L: tokens, K: tokens kept, D: width, H: heads, d: head size, G: grid side, R: rows of all samples.
"""

import argparse
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import aot
import command
import points
from mdt_fast import kernels
from mdt_fast.errors import UserError
from mdt_fast.kernels.backends import INTERPRETING
from mdt_fast.kernels.float8.registered import multiplies
from mdt_fast.kernels.native import MISSING
from mdt_fast.masking import MaskPlan
from mdt_fast.optim import FusedAdamW, FusedAdan
from rows import RowFile, machine

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
FOUND = 9
"""The exit code that the sanitizer is told to return if it finds anything."""
NATIVE = ("mask_plan", "optim")
"""Rooms with kernels in ``csrc/``."""
B, L, K, D, H, G = 3, 25, 11, 40, 3, 5
HEAD_DIMS = (24, 72)
LENGTHS = (5, 0, 12)
"""Lengths of the B ragged samples."""
CALLS = (
    "rel_attention", "ln_modulate", "bias_gelu", "sums", "tokens", "patch_embed", "cfg_step", "mask_plan",
    "optim", "float8",
)  # fmt: skip

Call = Callable[[], object]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the calls. Returns 0; 1 if the sanitizer found something or did not end well, or if a kernel that
    this machine can run was not reached; 2 after a user error; 130 after Ctrl-C."""
    argv = list(sys.argv[1:] if argv is None else argv)
    return command.guarded("sanitize", lambda kept: _main(argv, kept))


def _main(argv: list[str], kept: command.Kept) -> int:
    args = _parser().parse_args(argv)
    asked = command.names("--ops", args.ops, CALLS)
    device = command.device(args.device)
    command.at_least_one("--jobs", args.jobs)
    if args.tool is None:
        return run(asked, device, part_of(args.part))
    if args.tool not in TOOLS:
        raise UserError(f"--tool: got {args.tool!r}, expected {', '.join(TOOLS)}")
    if device.type != "cuda":
        raise UserError("--tool: needs a CUDA device; without --tool the calls run here on their own")
    line = shlex.join(["python", "bench/sanitize.py", *argv])
    kept.rows = rows = RowFile(args.json, machine(device, line))
    code = under(args.tool, asked, device, args.jobs)
    rows.add(
        (None, float(code == 0), None), bench="sanitize", op=args.tool, shape=",".join(asked), mode="fwd+bwd",
        provider="compute-sanitizer", dtype="all", metric="clean", unit="1", switches={},
    )  # fmt: skip
    print(f"{args.tool}: {'clean' if code == 0 else 'NOT clean' if code == FOUND else 'did not end well'}")
    return int(code != 0)


def _parser() -> argparse.ArgumentParser:
    parser = command.Parser(
        prog="sanitize", description="Run every kernel once, optionally under compute-sanitizer."
    )
    parser.add_argument("--tool", help=f"one of {', '.join(TOOLS)} (default: none)")
    parser.add_argument("--ops", default=",".join(CALLS), help="rooms, comma-separated (default: all)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    parser.add_argument(
        "--jobs",
        type=int,
        default=1,
        help="with --tool: parallel processes that share the calls (default: 1)",
    )
    parser.add_argument("--part", default="1/1", help="I/N: every N-th call, from the I-th (default: 1/1)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="append the outcome to this file")
    return parser


def part_of(text: str) -> slice:
    """The calls that ``--part`` selects."""
    first, _, count = text.partition("/")
    if not (first.isdigit() and count.isdigit() and 1 <= int(first) <= int(count)):
        raise UserError(f"--part: got {text!r}, expected I/N with 1 <= I <= N")
    return slice(int(first) - 1, None, int(count))


def under(tool: str, asked: Sequence[str], device: torch.device, jobs: int) -> int:
    """Run this script under compute-sanitizer, in ``jobs`` processes. Returns the first exit code that is not
    0, or 0."""
    sanitizer = find()
    # Give each tensor its own allocation: within torch's cache nothing would be out of bounds.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    line = [
        sanitizer, "--tool", tool, "--error-exitcode", str(FOUND), "--target-processes", "application-only",
        sys.executable, __file__, "--device", str(device), "--ops", ",".join(asked), "--part",
    ]  # fmt: skip
    parts = [f"{i}/{jobs}" for i in range(1, jobs + 1)]
    started = [subprocess.Popen([*line, part], env=environment) for part in parts]
    return next((code for code in [one.wait() for one in started] if code), 0)


def find() -> str:
    """The path of compute-sanitizer."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    for path in (shutil.which("compute-sanitizer"), f"{home}/bin/compute-sanitizer",
                 f"{home}/compute-sanitizer/compute-sanitizer"):  # fmt: skip
        if path is not None and os.access(path, os.X_OK):
            return path
    raise UserError(
        f"--tool: compute-sanitizer was not found in PATH or {home} (CUDA_HOME); the CUDA toolkit has it"
    )


def run(asked: Sequence[str], device: torch.device, part: slice) -> int:
    """Run every call of ``part`` once and print how many kernels were reached. Returns 1 if all calls ran but
    did not reach every kernel this machine can run, else 0."""
    every = {name for op, name in triton_kernels() if op in asked}
    with launched() as reached:
        for name, call in [*calls(asked, device)][part]:
            call()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            print(f"{name}: ran", flush=True)
    missed = sorted(every - reached)
    if part != slice(0, None, 1):
        print(f"{len(reached)} Triton kernels ran in this part")
        return 0
    if device.type == "cpu" and not INTERPRETING:
        print(f"no GPU: 0 of {len(every)} Triton kernels (TRITON_INTERPRET=1 runs them in the interpreter)")
        return 0
    if device.type == "cuda" and set(asked) & set(NATIVE) and MISSING["cuda"] is not None:
        print(f"the CUDA kernels of csrc/ were not reached: {MISSING['cuda']}")
        missed.append("csrc")
    print(f"{len(every - set(missed))} of {len(every)} Triton kernels ran")
    if missed:
        print(f"not reached: {', '.join(missed)}")
    return int(bool(missed))


def triton_kernels() -> Iterator[tuple[str, str]]:
    """Every (room, kernel) that an ``aot.py`` lists."""
    for op in aot.ROOMS:
        for case in import_module(f"mdt_fast.kernels.{op}.aot").cases("sm_90"):
            yield op, case.kernel.__name__


@contextmanager
def launched() -> Iterator[set[str]]:
    """The names of the Triton kernels launched inside the context."""
    from triton.runtime.jit import KernelInterface

    reached: set[str] = set()
    plain = KernelInterface.__getitem__

    def noted(self: Any, grid: Any) -> Any:
        reached.add(self.__name__)
        return plain(self, grid)

    KernelInterface.__getitem__ = noted
    try:
        yield reached
    finally:
        KernelInterface.__getitem__ = plain


def calls(asked: Sequence[str], device: torch.device) -> Iterator[tuple[str, Call]]:
    """Yield each call with a name that describes the case, in float32 and bfloat16."""
    makers = {
        "rel_attention": _attention, "ln_modulate": _rows, "bias_gelu": _gelu, "sums": _sums,
        "tokens": _tokens, "patch_embed": _patches, "cfg_step": _sampling, "mask_plan": _masks,
        "optim": _steps, "float8": _float8,
    }  # fmt: skip
    for op, dtype in product(asked, (torch.float32, torch.bfloat16)):
        generator = torch.Generator(device).manual_seed(0)

        def make(*shape: int, dtype: torch.dtype = dtype, generator: torch.Generator = generator) -> Tensor:
            return torch.randn(shape, generator=generator, device=device).to(dtype).requires_grad_()

        for name, call in makers[op](make):
            yield f"{op} {name} {str(dtype).removeprefix('torch.')}", call


def _both(function: Callable[..., Any], *arguments: Any, **named: Any) -> Call:
    return points.call_of("fwd+bwd", partial(function, **named), arguments)


def _offsets(*lengths: int, like: Tensor) -> Tensor:
    return torch.tensor([0, *lengths], device=like.device).cumsum(0).int()


def _plan(x: Tensor) -> MaskPlan:
    return MaskPlan.from_noise(torch.rand(B, L, device=x.device), K).sorted()


def _attention(make: Callable[..., Tensor]) -> Iterator[tuple[str, Call]]:
    table = make((2 * G - 1) ** 2 + 3, H)
    ways = [("lookup", "recompute"), ("lookup", "store"), ("dense", "recompute")]
    for d in HEAD_DIMS:
        q, k, v = (make(B, H, L, d) for _ in range(3))
        yield f"d={d} no bias", _both(kernels.rel_attention, q, k, v)
        for bias_form, table_grad in ways:
            how: dict[str, Any] = {"grid_size": G, "bias_form": bias_form, "table_grad": table_grad}
            name = f"d={d} {bias_form} {table_grad}"
            yield f"{name} all", _both(kernels.rel_attention, q, k, v, table, **how)
            pos = _plan(q).ids_keep
            some = [make(B, H, K, d) for _ in range(3)]
            yield f"{name} kept", _both(kernels.rel_attention, *some, table, q_pos=pos, k_pos=pos, **how)
            offsets = _offsets(5, 0, L, 9, like=q)
            places = torch.cat([torch.randperm(L)[:n] for n in (5, 0, L, 9)]).to(q.device)
            yield f"{name} ragged", _both(
                kernels.rel_attention_qkvpacked, make(len(places), 3, H, d), table, pos=places,
                offsets=offsets, max_length=L, **how,
            )  # fmt: skip


def _rows(make: Callable[..., Tensor]) -> Iterator[tuple[str, Call]]:
    lengths = LENGTHS[:B]
    for name, rows, offsets in (("", (B, L), None), (" ragged", (sum(lengths),), lengths)):
        x, y, (gate, shift, scale) = make(*rows, D), make(*rows, D), (make(B, D) for _ in range(3))
        where = {"offsets": None if offsets is None else _offsets(*offsets, like=x)}
        layer = make(2 * D, D), make(2 * D)
        yield f"plain{name}", _both(kernels.ln_modulate, x, shift, scale, **where)
        yield f"gated{name}", _both(kernels.gate_residual_ln_modulate, x, y, gate, shift, scale, **where)
        yield f"residual{name}", _both(kernels.gate_residual, x, y, gate, **where)
        yield f"linear{name}", _both(kernels.ln_modulate_linear, x, shift, scale, *layer, **where)
        yield (
            f"residual linear{name}",
            _both(kernels.residual_ln_modulate_linear, x, shift, scale, *layer, **where),
        )
        yield (
            f"gated linear{name}",
            _both(kernels.gate_residual_ln_modulate_linear, x, y, gate, shift, scale, *layer, **where),
        )


def _gelu(make: Callable[..., Tensor]) -> Iterator[tuple[str, Call]]:
    x, bias = make(B, L, 4 * D + 8), make(4 * D + 8)
    yield "alone", _both(kernels.bias_gelu, x, bias)
    yield "linear", _both(kernels.gelu_linear, x, bias, make(D, 4 * D + 8), make(D))


def _float8(make: Callable[..., Tensor]) -> Iterator[tuple[str, Call]]:
    """Widths are multiples of 16, as float8 products on GPUs require. On a GPU without them nothing runs."""
    device = make(1).device
    if device.type == "cuda" and not multiplies(device):
        return
    wide, weight, bias = 48, make(32, 48), make(32)
    m, lengths = [make(B, wide) for _ in range(3)], LENGTHS[:B]
    for rows in ((B, L), (sum(lengths),)):
        x = make(*rows, wide)
        where = {"offsets": _offsets(*lengths, like=x) if len(rows) == 1 else None, "float8": True}
        yield f"{rows} linear", _both(kernels.linear, x, weight, bias, float8=True)
        yield f"{rows} gelu", _both(kernels.gelu_linear, x, make(wide), weight, bias, float8=True)
        yield f"{rows} norm", _both(kernels.ln_modulate_linear, x, *m[1:], weight, bias, **where)
        gated = x, make(*rows, wide), *m, weight, bias
        yield f"{rows} gated norm", _both(kernels.gate_residual_ln_modulate_linear, *gated, **where)
    yield "odd rows", partial(kernels.quantize_rows, make(7, 41).detach(), factor=make(41).detach())
    yield "odd weight", partial(kernels.quantize_weight, make(37, 41).detach())


def _sums(make: Callable[..., Tensor]) -> Iterator[tuple[str, Call]]:
    for rows in (1, 700):  # one chunk, and several
        yield f"{rows} rows", _both(kernels.sum_rows, make(rows, D))


def _tokens(make: Callable[..., Tensor]) -> Iterator[tuple[str, Call]]:
    x = make(B, L, D)
    plan = _plan(x)
    yield "gather", _both(kernels.gather_tokens, x, plan.ids_keep)
    yield "gather, restore", _both(kernels.gather_tokens, x, plan.ids_keep, plan.ids_restore)
    yield "merge", _both(kernels.merge_tokens, x, make(B, L - K, D), plan.ids_restore)
    yield (
        "unmask",
        _both(kernels.unmask_tokens, make(B, K, D), make(1, 1, D), make(1, L, D), plan.ids_restore),
    )


def _patches(make: Callable[..., Tensor]) -> Iterator[tuple[str, Call]]:
    for p in (2, 3):
        x, weight = make(B, 4, G * p, G * p), make(D, 4, p, p)
        ids = _plan(x).ids_keep
        yield f"p={p}", _both(kernels.patch_embed, x, weight, make(D), make(1, L, D))
        yield (
            f"p={p} chosen",
            _both(lambda *a, ids=ids: kernels.patch_embed(*a, ids), x, weight, make(D), make(1, L, D)),
        )


def _sampling(make: Callable[..., Tensor]) -> Iterator[tuple[str, Call]]:
    output = make(2 * B, 8, 5, 5).detach()
    x, noise = (make(2 * B, 4, 5, 5).detach().float() for _ in range(2))
    alphas = torch.linspace(0.9999, 0.98, 100, dtype=torch.float64).cumprod(0)
    scale = torch.full((B,), 4.0, device=x.device)
    coefficients = {"ddpm": kernels.ddpm_coefficients, "ddim": kernels.ddim_coefficients}
    for kind, of in coefficients.items():
        row = of(alphas)[50].to(x.device)
        yield f"{kind} guided", partial(kernels.cfg_step, output, x, noise, row, scale=scale, kind=kind)
        yield kind, partial(kernels.cfg_step, output, x, noise, row, kind=kind)


def _masks(make: Callable[..., Tensor]) -> Iterator[tuple[str, Call]]:
    for tokens, kept in ((L, K), (L, 0), (300, 300), (1030, 7)):
        noise = make(B, tokens).detach().float()
        yield f"{kept} of {tokens}", partial(kernels.mask_plan, noise, kept)


def _steps(make: Callable[..., Tensor]) -> Iterator[tuple[str, Call]]:
    for cls in (FusedAdan, FusedAdamW):
        params = [nn.Parameter(make(*shape).detach()) for shape in ((33, 7), (5,), (1, 1030))]
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer: Any = cls(params, lr=1e-3, max_grad_norm=1.0)
        optimizer.add_ema([p.detach().clone().float() for p in params], 0.9)
        yield f"{cls.__name__}, first", optimizer.step
        yield f"{cls.__name__}, second", optimizer.step


if __name__ == "__main__":
    sys.exit(main())
