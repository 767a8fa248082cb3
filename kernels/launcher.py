"""Launches of Triton kernels, without most of the Python that Triton runs for each.

``kernel[grid](...)`` binds and classifies every argument anew, which takes the host longer than many kernels
take the GPU. Here a launch that has been seen before is recognised by its numbers, dtypes and constants, and
what Triton compiled for it is launched at once.
"""

from typing import Any

import torch
import triton
from triton import knobs

from .backends import INTERPRETING

VERSIONS = "3.6", "3.7"
"""The versions of Triton whose compiled kernels take the arguments given below."""
KNOWN = triton.__version__.startswith(VERSIONS) and not INTERPRETING and torch.version.hip is None
"""Whether launches are remembered; not on AMD GPUs, for which Triton also compiles by the size of tensors."""
ALIGNED = 16
"""Triton compiles differently for addresses that are multiples of it. Launches with others go its own way."""
MOST = 8192
"""Launches to remember: new numbers of tokens may keep coming."""

_compiled: dict[Any, tuple[Any, tuple[Any, ...]]] = {}
"""The compiled kernel of a launch, and its constants in the order of the kernel's parameters."""
_pointers: dict[int, tuple[int, Any]] = {}
"""How many parameters of a kernel are pointers; and the kernel, whose id is the key."""


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    """``kernel[grid](*args, **constants)`` on the current device and stream.

    ``args`` are all parameters but the constants: first tensors, whose parameters' names end with ``_ptr``,
    then numbers. A parameter takes only ints or only floats, as 1 and 1.0 are one key. ``constants`` are the
    constexpr parameters, which are the kernel's last, and options such as ``num_warps``, in the same order in
    all launches of a kernel.
    """
    if not KNOWN or _watched(kernel):
        kernel[grid](*args, **constants)
        return
    name = id(kernel)  # its hash is its source's
    if name not in _pointers:
        _pointers[name] = sum(p.endswith("_ptr") for p in kernel.arg_names), kernel
    pointers, _ = _pointers[name]
    addresses, low, dtypes = [], 0, []
    device = devices = args[0].get_device()
    for x in args[:pointers]:
        address = x.data_ptr()
        addresses.append(address)
        low |= address
        dtypes.append(x.dtype)
        devices |= x.get_device()  # a CPU's is -1
    numbers = args[pointers:]
    key = name, device, *dtypes, *numbers, *constants.values()
    known = _compiled.get(key)
    if low % ALIGNED or devices != device:
        kernel[grid](*args, **constants)
    elif known is None:
        compiled = kernel[grid](*args, **constants)
        if compiled is not None:
            if len(_compiled) >= MOST:
                _compiled.clear()
            _compiled[key] = compiled, tuple(constants[p] for p in kernel.arg_names[len(args) :])
    else:
        compiled, values = known
        x, y, z, *_ = *grid, 1, 1
        stream = torch._C._cuda_getCurrentRawStream(device)
        # Addresses, as Triton would ask the driver about each tensor's.
        compiled.run(
            x, y, z, stream, compiled.function, compiled.packed_metadata, None, None, None,
            *addresses, *numbers, *values,
        )  # fmt: skip


def _watched(kernel: Any) -> bool:
    """Whether a profiler looks at launches."""
    hooks = knobs.runtime
    return bool(kernel.pre_run_hooks or _calls(hooks.launch_enter_hook) or _calls(hooks.launch_exit_hook))


def _calls(hook: Any) -> bool:
    return hook is not None and bool(getattr(hook, "calls", True))
