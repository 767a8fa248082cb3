"""Compile the Triton kernels that ``throughput.py`` will launch beforehand, in parallel processes.

    python bench/ahead.py --model MDTv2_S_2,MDTv2_XL_2 --batch 4,32,128 --providers fast,fast-lean-graphs

With an empty Triton cache, a benchmark spends minutes compiling one kernel after another as it meets them.
This script runs a model with few blocks through every case and records the launches instead of making them.
The recorded kernels are then compiled into Triton's cache, where every other process finds them.
"""

import os
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import import_module
from itertools import product
from multiprocessing import get_context
from typing import Any

import torch

import command
import inputs
import providers
from formats import one_line
from mdt_fast.config import ModelConfig
from mdt_fast.errors import UserError
from request import Request
from request import parser as request_parser
from steps import Case, step_of

BLOCKS, DECODER_BLOCKS = 6, 2
"""Blocks that are enough for every kernel of a deep model: encoder blocks with and without a long skip, a
side-interpolater and decoder blocks."""


@dataclass(frozen=True)
class Kernel:
    """A Triton kernel, by module and name, for certain argument types and constants. ``specialization`` is
    the JSON that ``JITFunction.preload`` takes."""

    module: str
    name: str
    specialization: str


def main(argv: Sequence[str] | None = None) -> int:
    """Compile. Returns 0; 1 if a kernel failed; 2 after a user error; 130 after Ctrl-C."""
    argv = list(sys.argv[1:] if argv is None else argv)
    return command.guarded("ahead", lambda kept: _main(argv))


def _main(argv: list[str]) -> int:
    given = vars(_parser().parse_args(argv))
    jobs = given.pop("jobs")
    command.at_least_one("--jobs", jobs)
    asked = [f"--{name}={value}" for name, value in given.items() if value is not None]
    request = Request(request_parser().parse_args(asked))
    if request.models is None or request.batches is None:
        raise UserError("--model and --batch: both are required, as kernels are compiled for them")
    if not forms(request):
        raise UserError(f"--providers: got {given['providers']}, none of which launches our kernels")
    if request.device.type != "cuda":
        raise UserError(f"--device: Triton compiles for a GPU, got {request.device}")
    begun = time.monotonic()
    kernels = kernels_of(request)
    found = time.monotonic()
    jobs = min(jobs or os.cpu_count() or 1, len(kernels))
    problems = compile_all(kernels, jobs)
    for problem in problems:
        print(f"failed: {problem}")
    print(
        f"{len(kernels) - len(problems)} kernels compiled by {jobs} processes in "
        f"{time.monotonic() - found:.0f} s, after {found - begun:.0f} s spent finding them"
    )
    return 1 if problems else 0


def kernels_of(request: Request) -> list[Kernel]:
    """The kernels that the fast model launches for the requested cases and providers, graphed or not."""
    with noted() as kernels:
        for model, deep in (request.models or {}).items():
            config, made = few_blocks(deep), None
            for mode, dtype, batch in product(request.modes, request.dtypes, request.batches or ()):
                case = Case(model, config, mode, batch, dtype, request.device, turned=request.turned)
                made = made or providers.Modules(config, request.device, None, case.switches)
                images = inputs.load(request.data, config, batch)
                for name in forms(request):
                    _run(case, name, made, images, request.lengths)
    return list(kernels)


def forms(request: Request) -> list[str]:
    """The requested providers that launch our kernels, without ``-graphs``, which changes no kernel."""
    names = {name.removesuffix("-graphs") for name in request.providers or ["fast"]}
    return sorted(name for name in names if name.startswith("fast") and not name.endswith("-compiled"))


def few_blocks(config: ModelConfig) -> ModelConfig:
    """The same model with few blocks."""
    if config.depth <= BLOCKS:
        return config
    return replace(config, depth=BLOCKS, decode_layer=min(DECODER_BLOCKS, config.decode_layer or 0))


def _run(case: Case, name: str, modules: providers.Modules, images: inputs.Inputs, lengths: int) -> None:
    try:
        provider = providers.make(name, modules)
        step = step_of(case, provider, images, inputs.len_keeps(case.config, lengths))
    except (providers.Skip, UserError) as error:
        print(f"{name}: nothing to compile: {error}", file=sys.stderr)
        return
    for index in range(lengths):
        step(index)


@contextmanager
def noted() -> Iterator[dict[Kernel, None]]:
    """Record the Triton kernels launched inside the context, in order. None of them runs, so results are
    meaningless."""
    import triton

    kernels: dict[Kernel, None] = {}

    def note(*, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        function = fn.jit_function.fn
        kernels[Kernel(function.__module__, function.__name__, compile["specialization_data"])] = None
        return True  # neither compiled nor launched

    runtime, checked = triton.knobs.runtime, torch._assert_async
    before = runtime.jit_cache_hook
    runtime.jit_cache_hook = note
    torch._assert_async = lambda *_: None  # it would check what no kernel wrote
    try:
        yield kernels
    finally:
        runtime.jit_cache_hook, torch._assert_async = before, checked


def compile_all(kernels: Sequence[Kernel], jobs: int) -> list[str]:
    """Compile all kernels in ``jobs`` processes. Returns a line for each failure."""
    if not kernels:
        return []
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:  # CUDA cannot be forked
        return [problem for problem in pool.map(compiled, kernels) if problem is not None]


def compiled(kernel: Kernel) -> str | None:
    """Compile a kernel and make it ready to launch. Returns the reason if that fails, else None."""
    try:
        built = getattr(import_module(kernel.module), kernel.name).preload(kernel.specialization)
        built.run  # noqa: B018 - compiles the launcher, too
    except Exception as error:
        return f"{kernel.name}: {one_line(error)}"
    return None


def _parser() -> command.Parser:
    parser = command.Parser("ahead", "Compile the Triton kernels that throughput.py will launch.")
    parser.add_argument("--model", help="models, as in throughput.py (required)")
    parser.add_argument("--batch", help="images per step, comma-separated (required)")
    parser.add_argument("--mode", help="train, sample or both, comma-separated (default: both)")
    parser.add_argument("--dtype", help="float32, bfloat16 or both, comma-separated (default: bfloat16)")
    parser.add_argument(
        "--providers",
        help="as in throughput.py; only fast and its variants without -compiled matter (default: fast)",
    )
    parser.add_argument("--lengths", type=int, help="how many kept-token counts, as in throughput.py")
    parser.add_argument("--turn", metavar="SWITCHES", help="switches to flip, comma-separated")
    parser.add_argument("--device", default="auto", help="auto, cuda or cuda:N")
    parser.add_argument("--jobs", type=int, help="parallel processes (default: number of CPU cores)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
