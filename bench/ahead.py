"""Compiles the Triton kernels of ``throughput.py`` before it is run, in processes side by side.

    python bench/ahead.py --model MDTv2_S_2,MDTv2_XL_2 --batch 4,32,128 --providers fast,fast-lean-graphs

Where Triton has compiled nothing yet, a bench spends minutes on it, one kernel after the other as they are
met. Here a model of few blocks goes through every case, with launches that are noted and not made; what was
noted is then compiled into Triton's cache, where every other process finds it.
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
"""Of a model that has every kernel of a deep one: encoder blocks with a long skip and without, a
side-interpolater, decoder blocks."""


@dataclass(frozen=True)
class Kernel:
    """A Triton kernel, by the module it is in, for arguments of certain types and certain constants: what
    ``JITFunction.preload`` takes, as JSON."""

    module: str
    name: str
    specialization: str


def main(argv: Sequence[str] | None = None) -> int:
    """Compile. Returns 0; 1 if a kernel did not; 2 after a user's mistake; 130 after Ctrl-C."""
    argv = list(sys.argv[1:] if argv is None else argv)
    return command.guarded("ahead", lambda kept: _main(argv))


def _main(argv: list[str]) -> int:
    given = vars(_parser().parse_args(argv))
    jobs = given.pop("jobs")
    command.at_least_one("--jobs", jobs)
    asked = [f"--{name}={value}" for name, value in given.items() if value is not None]
    request = Request(request_parser().parse_args(asked))
    if request.models is None or request.batches is None:
        raise UserError("--model and --batch: none given, and kernels are compiled for certain ones")
    if not forms(request):
        raise UserError(f"--providers: got {given['providers']}, of which none launches kernels of ours")
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
        f"{time.monotonic() - found:.0f} s, after {found - begun:.0f} s of looking for them"
    )
    return 1 if problems else 0


def kernels_of(request: Request) -> list[Kernel]:
    """What the fast model launches in the cases and by the providers asked for, as graphs or not."""
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
    """The providers asked for that launch kernels of ours, which they do as graphs and without."""
    names = {name.removesuffix("-graphs") for name in request.providers or ["fast"]}
    return sorted(name for name in names if name.startswith("fast") and not name.endswith("-compiled"))


def few_blocks(config: ModelConfig) -> ModelConfig:
    """The same layers, few of them."""
    if config.depth <= BLOCKS:
        return config
    return replace(config, depth=BLOCKS, decode_layer=min(DECODER_BLOCKS, config.decode_layer or 0))


def _run(case: Case, name: str, modules: providers.Modules, images: inputs.Inputs, lengths: int) -> None:
    try:
        provider = providers.make(name, modules)
        step = step_of(case, provider, images, inputs.len_keeps(case.config, lengths))
    except providers.Skip:
        return
    for index in range(lengths):
        step(index)


@contextmanager
def noted() -> Iterator[dict[Kernel, None]]:
    """Triton's kernels that were to be launched in here, in their order; none is, so numbers mean nothing."""
    import triton

    kernels: dict[Kernel, None] = {}

    def note(*, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        function = fn.jit_function.fn
        kernels[Kernel(function.__module__, function.__name__, compile["specialization_data"])] = None
        return True  # neither compiled nor launched

    runtime, checked = triton.knobs.runtime, torch._assert_async
    before = runtime.jit_cache_hook
    runtime.jit_cache_hook = note
    torch._assert_async = lambda *_: None  # of what a kernel was to write
    try:
        yield kernels
    finally:
        runtime.jit_cache_hook, torch._assert_async = before, checked


def compile_all(kernels: Sequence[Kernel], jobs: int) -> list[str]:
    """Each in one of so many processes; what went wrong, a line for each."""
    if not kernels:
        return []
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:  # of CUDA nothing can be forked
        return [problem for problem in pool.map(compiled, kernels) if problem is not None]


def compiled(kernel: Kernel) -> str | None:
    """Why it could not be compiled and made ready to be launched."""
    try:
        built = getattr(import_module(kernel.module), kernel.name).preload(kernel.specialization)
        built.run  # noqa: B018 - what launches it is compiled, too
    except Exception as error:
        return f"{kernel.name}: {one_line(error)}"
    return None


def _parser() -> command.Parser:
    parser = command.Parser("ahead", "Compile the Triton kernels that throughput.py will launch.")
    parser.add_argument("--model", help="as in throughput.py, needed")
    parser.add_argument("--batch", help="images per step, several by comma, needed")
    parser.add_argument("--mode", help="train or sample, or both by a comma (default: both)")
    parser.add_argument("--dtype", help="float32 or bfloat16, or both by a comma (default: bfloat16)")
    parser.add_argument(
        "--providers",
        help="of throughput.py's; fast and its forms that are not compiled count (default: fast)",
    )
    parser.add_argument("--lengths", type=int, help="numbers of kept tokens, as in throughput.py")
    parser.add_argument("--turn", metavar="SWITCHES", help="switches to turn the other way, by comma")
    parser.add_argument("--device", default="auto", help="auto, cuda or cuda:N")
    parser.add_argument("--jobs", type=int, help="processes (default: as many as there are cores)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
