"""Launches without Triton's own Python: what is launched, and when Triton's code runs instead."""

import importlib
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from mdt_fast.kernels import launcher

ROOMS = sorted(path.parent.name for path in Path(launcher.__file__).parent.glob("*/kernel.py"))


class Kernel:
    """As much of a Triton kernel as a launch needs; it compiles for each new set of dtypes and constants."""

    arg_names = ("x_ptr", "out_ptr", "D", "eps", "MASKED", "BLOCK")

    def __init__(self) -> None:
        self.pre_run_hooks: list[Any] = []
        self.by_triton: list[tuple[Any, ...]] = []
        self.at_once: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def run(*args: Any, **constants: Any) -> Any:
            self.by_triton.append((grid, *args, constants))
            return SimpleNamespace(function=7, packed_metadata="data", run=lambda *a: self.at_once.append(a))

        return run


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    monkeypatch.setattr(launcher, "KNOWN", True)
    monkeypatch.setattr(launcher, "_compiled", {})
    monkeypatch.setattr(launcher, "_pointers", {})
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 40 + device, raising=False)
    return Kernel()


def call(kernel: Kernel, *args: Any, grid: tuple[int, ...] = (3,), **constants: Any) -> None:
    launcher.launch(kernel, grid, *args, **{"BLOCK": 64, "MASKED": True, "num_warps": 4, **constants})


def pair(dtype: torch.dtype = torch.float32, start: int = 0) -> tuple[Tensor, Tensor]:
    return torch.zeros(start + 64, dtype=dtype)[start:], torch.zeros(64, dtype=dtype)


def test_the_second_launch_runs_what_the_first_compiled(kernel: Kernel) -> None:
    (x, out), (x2, out2) = pair(), pair()
    call(kernel, x, out, 64, 1e-6, grid=(3, 5))
    call(kernel, x2, out2, 64, 1e-6, grid=(9,))
    assert [launch[0] for launch in kernel.by_triton] == [(3, 5)]
    (launch,) = kernel.at_once
    # Constants come in the order of the parameters; options are not among them.
    assert launch[:9] == (9, 1, 1, 39, 7, "data", None, None, None)
    assert launch[9:] == (x2.data_ptr(), out2.data_ptr(), 64, 1e-6, True, 64)


@pytest.mark.parametrize(
    "other",
    [
        {"args": (*pair(torch.float16), 64, 1e-6)},
        {"args": (*pair(), 1, 1e-6)},
        {"args": (*pair(), 65, 1e-6)},
        {"args": (*pair(), 64, 1e-5)},
        {"MASKED": False},
        {"BLOCK": 32},
        {"num_warps": 8},
    ],
    ids=["dtype", "one", "number", "float", "constant", "block", "option"],
)
def test_another_launch_is_triton_s_again(kernel: Kernel, other: dict[str, Any]) -> None:
    call(kernel, *pair(), 64, 1e-6)
    call(kernel, *other.pop("args", (*pair(), 64, 1e-6)), **other)
    assert len(kernel.by_triton) == 2
    assert not kernel.at_once


class OnGPU3(Tensor):
    """Says that it is there."""

    def get_device(self) -> int:
        return 3


def test_a_tensor_on_another_device(kernel: Kernel) -> None:
    """Triton says what is wrong with it; all on another device are another launch."""
    call(kernel, *pair(), 64, 1e-6)
    x, out = pair()
    for _ in range(2):
        call(kernel, x.as_subclass(OnGPU3), out, 64, 1e-6)
    assert (len(kernel.by_triton), len(kernel.at_once)) == (3, 0)
    for _ in range(2):
        call(kernel, x.as_subclass(OnGPU3), out.as_subclass(OnGPU3), 64, 1e-6)
    assert (len(kernel.by_triton), len(kernel.at_once)) == (4, 1)
    assert kernel.at_once[0][3] == 43  # that device's stream


@pytest.mark.parametrize("which", [0, 1])
def test_addresses_that_are_not_aligned(kernel: Kernel, which: int) -> None:
    call(kernel, *pair(), 64, 1e-6)
    tensors = [*pair()]
    tensors[which] = pair(start=1)[0]
    for _ in range(2):
        call(kernel, *tensors, 64, 1e-6)
    assert len(kernel.by_triton) == 3
    call(kernel, *pair(start=4), 64, 1e-6)
    assert len(kernel.at_once) == 1


def test_profilers_see_launches(kernel: Kernel) -> None:
    hooks = launcher.knobs.runtime
    call(kernel, *pair(), 64, 1e-6)
    seen: list[Any] = []
    hooks.launch_enter_hook.add(seen.append)
    try:
        call(kernel, *pair(), 64, 1e-6)
    finally:
        hooks.launch_enter_hook.remove(seen.append)
    kernel.pre_run_hooks.append(print)
    call(kernel, *pair(), 64, 1e-6)
    assert len(kernel.by_triton) == 3
    kernel.pre_run_hooks.clear()
    call(kernel, *pair(), 64, 1e-6)
    assert len(kernel.at_once) == 1


def test_no_more_are_remembered_than_allowed(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "MOST", 3)
    for tokens in range(10):
        call(kernel, *pair(), tokens, 1e-6)
    assert 1 <= len(launcher._compiled) <= 3


@pytest.mark.parametrize("room", ROOMS)
def test_how_a_launch_tells_arguments_apart(room: str) -> None:
    """Parameters are pointers, numbers, then constants; and a kernel has one launch, so its constants come in
    one order."""
    folder = Path(launcher.__file__).parent / room
    launches = "".join(path.read_text() for path in folder.glob("*.py"))
    for path in folder.glob("kernel*.py"):
        module = importlib.import_module(f"mdt_fast.kernels.{room}.{path.stem}")
        for name, kernel in vars(module).items():
            if name.endswith("_kernel") and kernel.fn.__module__ == module.__name__:
                kinds = [
                    2 if "constexpr" in str(p.annotation) else 0 if p.name.endswith("_ptr") else 1
                    for p in kernel.signature.parameters.values()
                ]
                assert kinds == sorted(kinds), name
                assert len(re.findall(rf"launch\(\s*{name},", launches)) == 1, name
