"""CUDA kernels on an emulated GPU (``cuda.c``): each runs as the CPU's kernel, on the same memory.

A pytest plugin; ``run.py`` starts it. Streams, allocators, captures and launches are PyTorch's own. A graph's
replay runs what was captured again, on the addresses it had then. Ops of this package run their launch code
(with ``EMULATE_COMPILE=1`` Triton compiles, too) and get their results from the CPU's op; Triton's kernels
outside of them, and where there is no CPU op, run in Triton's interpreter. What Inductor would compile runs
op by op.
"""

import ctypes
import functools
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map
from triton.runtime import interpreter, jit

aten, CPU = torch.ops.aten, torch.device("cpu")
CUDA = ctypes.CDLL(os.environ["LD_PRELOAD"])
LIMIT = int(os.environ.get("EMULATE_SECONDS", "0"))
COMPILE = os.environ.get("EMULATE_COMPILE") == "1"
LOCK = threading.RLock()

NATIVE = {
    "empty", "empty_strided", "as_strided", "view", "_reshape_alias", "resize_", "set_", "_pin_memory",
    "_local_scalar_dense", "record_stream", "is_pinned", "is_set_to", "unfold", "_efficientzerotensor",
    "_cudnn_init_dropout_state",
}  # fmt: skip
"""Ops that have no kernel: they make memory or views, or only copy."""


class Now:
    captured: list[Callable[[], None]] | None = None  # what the capture that is going on has seen
    launching = False  # launch code runs, whose kernels do nothing
    draws = 0


def view(x: Tensor) -> Tensor:
    """A CPU tensor over the memory of the CUDA tensor x."""
    storage = x.untyped_storage()
    here = torch._C._construct_storage_from_data_pointer(storage.data_ptr(), CPU, storage.nbytes())
    made = torch.empty(0, dtype=x.dtype, device=CPU)
    made.set_(here if storage.nbytes() else torch.UntypedStorage(0), x.storage_offset(), x.size(), x.stride())
    made = made.conj() if x.is_conj() else made
    return torch._neg_view(made) if x.is_neg() else made


def bytes_to(address: int, x: Tensor) -> None:
    if x.numel():
        reach = 1 + sum((n - 1) * step for n, step in zip(x.size(), x.stride()))
        ctypes.memmove(address, x.data_ptr(), reach * x.element_size())


def dense(x: Tensor) -> Tensor:
    x = x.resolve_conj().resolve_neg()
    whole = torch._prims_common.is_non_overlapping_and_dense_or_false(x)
    return x if whole else x.clone(memory_format=torch.contiguous_format)


def on_gpu(x: Tensor) -> Tensor:
    x = dense(x)
    made = torch.empty_strided(x.size(), x.stride(), dtype=x.dtype, device="cuda")
    bytes_to(made.data_ptr(), x)
    return made


def on_cpu(x: Any) -> Any:
    return view(x) if isinstance(x, Tensor) and x.is_cuda else x


def generator(given: torch.Generator | None) -> torch.Generator:
    """A CPU generator for one draw, from the CUDA generator's seed and offset, which go on."""
    own = torch.cuda.default_generators[0] if given is None else given
    try:
        seed, offset = own.initial_seed(), own.get_offset()
        own.set_offset(offset + 4096)
    except RuntimeError:  # while a graph is captured
        Now.draws += 1
        seed, offset = 977, Now.draws
    return torch.Generator().manual_seed((seed * 1000003 + offset * 7919) % 2**63)


def in_dtype(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    return a.to(dtype) @ b.to(dtype)


def added(c: Tensor, a: Tensor, b: Tensor, dtype: torch.dtype, beta: float = 1, alpha: float = 1) -> Tensor:
    return beta * c.to(dtype) + alpha * in_dtype(a, b, dtype)


def scaled(
    a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, bias: Tensor | None = None, scale: Any = None,
    dtype: torch.dtype | None = None, fast: bool = False,
) -> Tensor:  # fmt: skip
    product = (a.float() * scale_a) @ (b.float() * scale_b)
    return (product if bias is None else product + bias.float()).to(dtype or a.dtype)


def convolution(
    x: Tensor, w: Tensor, padding: Any, stride: Any, dilation: Any, groups: int, *_: Any
) -> Tensor:
    return aten.convolution(x, w, None, stride, padding, dilation, False, [0] * len(padding), groups)


OWN: dict[str, Callable[..., Any]] = {
    "aten::mm.dtype": in_dtype,
    "aten::bmm.dtype": in_dtype,
    "aten::addmm.dtype": added,
    "aten::baddbmm.dtype": added,
    "aten::mm.dtype_out": lambda *args, out: out.copy_(in_dtype(*args)),
    "aten::addmm.dtype_out": lambda *args, out, **kwargs: out.copy_(added(*args, **kwargs)),
    "aten::_scaled_mm": scaled,
    "aten::_scaled_mm.out": lambda *args, out, **kwargs: out.copy_(scaled(*args, **kwargs)),
    "aten::_fused_sdp_choice": lambda *args, **kwargs: 0,  # attention by products
    "aten::cudnn_convolution": convolution,
}
"""Kernels that a CPU does not have, or not in these dtypes."""


def kernel(name: str, op: Any) -> Callable[..., Any]:
    """What runs in place of the CUDA kernel of ``op``."""
    arguments, run_op = op._schema.arguments, OWN.get(name, op)
    draws = next((a.name for a in arguments if "Generator" in str(a.type)), None)
    tensors = [a.name for a in arguments if str(a.type) == "Tensor"]

    def run(*args: Any, **kwargs: Any) -> Any:
        if Now.launching and "_assert_async" in name:
            return None
        with LOCK, torch._C._AutoDispatchBelowAutograd():
            given = {**dict(zip((a.name for a in arguments), args)), **kwargs}
            seen: list[tuple[Tensor, Tensor, torch.Size, int]] = []

            def convert(x: Any) -> Any:
                if isinstance(x, Tensor) and x.is_cuda:
                    own = view(x)
                    seen.append((x, own, own.shape, own.untyped_storage().data_ptr()))
                    return own
                return CPU if isinstance(x, torch.device) else x

            call = {key: tree_map(convert, x) for key, x in given.items() if key != draws}
            for key in tensors:  # numbers, which arrive as such
                if isinstance(call.get(key), bool | int | float | complex):
                    call[key] = torch.tensor(call[key])
            positional: list[Any] = []
            for argument in arguments:
                if argument.kwarg_only or argument.name not in call:
                    break
                positional.append(call.pop(argument.name))

            def compute() -> Any:
                return run_op(*positional, **call, **({draws: generator(given.get(draws))} if draws else {}))

            result, resized = compute(), []
            for x, own, shape, address in seen:
                if own.shape != shape or own.untyped_storage().data_ptr() != address:
                    x.resize_(own.shape)
                    resized.append((x.data_ptr(), own))
            for address, own in resized:
                bytes_to(address, own.contiguous())
            made: list[tuple[int, Tensor]] = []

            def give(x: Any) -> Any:
                if not isinstance(x, Tensor):
                    return x
                for original, own, *_ in seen:
                    if own is x:
                        return original
                fresh = on_gpu(x)
                made.append((fresh.data_ptr(), fresh))
                return fresh

            output = tree_map(give, result)
            if Now.captured is not None:
                inputs, addresses = {id(own) for _, own, *_ in seen}, [address for address, _ in made]

                def again() -> None:
                    results = [
                        x for x in tree_leaves(compute()) if isinstance(x, Tensor) and id(x) not in inputs
                    ]
                    for address, x in zip([*addresses], results, strict=True):
                        bytes_to(address, dense(x))
                    for address, own in resized:
                        bytes_to(address, own.contiguous())

                Now.captured.append(again)
            return output

    return run


LIBRARIES: dict[str, torch.library.Library] = {}


def replace(name: str, function: Callable[..., Any]) -> None:
    space, _, op = name.partition("::")
    library = LIBRARIES.setdefault(space, torch.library.Library(space, "IMPL"))
    library.impl(op, function, "CUDA", allow_override=True)


def replace_pytorch() -> None:
    names = {*torch._C._dispatch_get_registrations_for_dispatch_key("CUDA"), *OWN, "aten::copy_"}
    for name in sorted(name for name in names if name.startswith("aten::")):
        base, _, overload = name.removeprefix("aten::").partition(".")
        op = getattr(getattr(aten, base, None), overload or "default", None)
        if op is None or base in NATIVE:
            continue
        if not any(r.alias_info is not None and not r.alias_info.is_write for r in op._schema.returns):
            replace(name, kernel(name, op))


def replace_graphs() -> None:
    graph = torch.cuda.CUDAGraph
    begin, end, replay, reset = graph.capture_begin, graph.capture_end, graph.replay, graph.reset
    captured: dict[int, list[Callable[[], None]]] = {}

    def capture_begin(self: Any, *args: Any, **kwargs: Any) -> None:
        CUDA.emulated_save()
        begin(self, *args, **kwargs)
        Now.captured = captured[id(self)] = []

    def capture_end(self: Any) -> None:
        Now.captured = None
        end(self)
        CUDA.emulated_restore()

    def replay_all(self: Any) -> None:
        replay(self)
        with LOCK, torch.inference_mode():  # it may have been captured in one
            for again in captured.get(id(self), ()):
                again()

    def forget(self: Any) -> None:
        captured.pop(id(self), None)
        reset(self)

    methods = {
        "capture_begin": capture_begin,
        "capture_end": capture_end,
        "replay": replay_all,
        "reset": forget,
    }
    for name, method in methods.items():
        setattr(graph, name, method)


def replace_triton() -> None:
    launch, interpreted = jit.JITFunction.run, functools.cache(interpreter.InterpretedFunction)

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        compiled = launch(self, *args, grid=grid, warmup=warmup, **kwargs) if COMPILE or warmup else None
        if warmup or Now.launching:
            return compiled
        with LOCK, torch.no_grad():
            own, options = tree_map(on_cpu, args), {key: on_cpu(x) for key, x in kwargs.items()}
        if "DIRECT" in options:
            options["DIRECT"] = False  # loads that the interpreter does not know

        def again() -> None:
            with LOCK, torch.no_grad(), np.errstate(all="ignore"):
                interpreted(self.fn).run(*own, grid=grid, warmup=False, **options)

        again()
        if Now.captured is not None:
            Now.captured.append(again)
        return compiled

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        scope = interpreter._patch_lang(self.fn)
        try:
            return interpreted(self.fn).rewrite()(*args, **kwargs)
        finally:
            scope.restore()

    def numbers(x: Any) -> np.ndarray:
        """In float32 what NumPy has no type for; Triton's own function multiplies bfloat16's bits."""
        narrow = x.dtype.scalar == tl.bfloat16 or (x.dtype.is_floating() and x.dtype.primitive_bitwidth == 8)
        if not narrow:
            return x.data
        return interpreter._convert_float(x.data, x.dtype.scalar, tl.float32, None).view(np.float32)

    def dot(self: Any, a: Any, b: Any, d: Any, *_: Any) -> Any:
        product = np.matmul(numbers(a), numbers(b), dtype=d.data.dtype)
        return interpreter.TensorHandle(product + d.data, d.dtype.scalar)

    theirs = interpreter.InterpreterBuilder.create_fp_to_fp
    narrow = {
        tl.bfloat16: (torch.bfloat16, np.uint16, torch.inf),
        tl.float8e4nv: (torch.float8_e4m3fn, np.uint8, 448),
    }

    def rounded(self: Any, x: Any, to: Any, mode: Any) -> Any:
        """To the nearest: Triton's own loses what carries into the exponent."""
        if to.scalar not in narrow or x.dtype.scalar != tl.float32:
            return theirs(self, x, to, mode)
        dtype, bits, most = narrow[to.scalar]
        given = torch.from_numpy(np.ascontiguousarray(x.data)).view(torch.float32)
        data = given.clamp(-most, most).to(dtype).view(torch.uint8).numpy().view(bits)
        return interpreter.TensorHandle(data.reshape(x.data.shape), to.scalar)

    jit.JITFunction.run, jit.JITFunction.__call__ = run, call
    interpreter.InterpreterBuilder.create_dot = dot
    interpreter.InterpreterBuilder.create_fp_to_fp = rounded


def replaced(name: str, launch: Callable[..., Any]) -> Callable[..., Any]:
    """One of this package's ops: its launch code makes the outputs, the CPU's op fills them."""

    def run(*args: Any) -> Any:
        if not any(isinstance(x, Tensor) and x.is_cuda for x in tree_leaves(args)):
            return launch(*args)
        with LOCK:
            own, before, captured = tree_map(on_cpu, args), Now.launching, Now.captured
            Now.launching, Now.captured = True, None
            try:
                outputs = launch(*args)
            finally:
                Now.launching, Now.captured = before, captured
            places = [view(x) for x in tree_leaves(outputs) if isinstance(x, Tensor)]

            def again() -> None:
                with torch.no_grad():
                    results: Sequence[Tensor] = [
                        x for x in tree_leaves(launch(*own)) if isinstance(x, Tensor)
                    ]
                    for place, x in zip(places, results, strict=True):
                        place.copy_(x.view(place.shape))

            try:
                again()
            except (
                RuntimeError,
                NotImplementedError,
                ValueError,
                AttributeError,
            ):  # no CPU op, or not in this dtype
                return launch(*args)
            if Now.captured is not None:
                Now.captured.append(again)
            return outputs

    return run


def replace_ours() -> None:
    registry, launcher = map(sys.modules.get, ("mdt_fast.kernels.registry", "mdt_fast.kernels.launcher"))
    if launcher:  # what launches by itself is not computed here
        launcher._watched = lambda kernel: not Now.launching
    modules = [module for name, module in [*sys.modules.items()] if name.startswith("mdt_fast")]
    for op in [x for module in modules for x in [*vars(module).values()]]:
        if registry and type(op) is registry.Op and not hasattr(op, "emulated"):
            op.emulated, op.function = True, replaced(op.name, op.function)
            replace(op.name, torch._disable_dynamo(op.function))


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    replace_ours()

    def stop(*_: Any) -> None:
        pytest.skip(f"takes more than {LIMIT} s on an emulated GPU")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(LIMIT)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def replace_inductor() -> None:
    from torch._dynamo.backends.debugging import aot_eager
    from torch._inductor import compile_fx

    compile_fx.compile_fx = lambda model, inputs, **_: aot_eager(model, inputs)


replace_pytorch()
replace_inductor()
replace_graphs()
replace_triton()
