"""A bench's kernels are found without being launched, and compiled for a GPU that need not be here."""

import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import ahead
import throughput
from mdt_fast.kernels.backends import INTERPRETING, launching
from providers import model_config

triton = pytest.importorskip("triton")
ROOM = "mdt_fast.kernels.bias_gelu"
pytestmark = pytest.mark.skipif(INTERPRETING, reason="for Triton's compiler")


class Driver:
    """The driver of an H100 that is not here: kernels are compiled for it, but never loaded."""

    utils = SimpleNamespace(
        get_device_properties=lambda device: {"max_shared_mem": 232448},
        load_binary=lambda *_: (None, None, 0, 0, 1024),
    )

    def __init__(self) -> None:
        self.launchers: list[str] = []

    def get_current_target(self) -> Any:
        return triton.backends.compiler.GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        self.launchers.append(source.name)
        return lambda *_: None


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Driver:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(triton.runtime.driver, "_active", Driver())
    kernel = launching(ROOM).bias_gelu_fwd_kernel  # others must not find its kernels for this driver
    monkeypatch.setattr(kernel, "device_caches", defaultdict(kernel.device_caches.default_factory))
    found: Driver = triton.runtime.driver.active
    return found


def test_kernels_are_noted_and_compiled(driver: Driver, tmp_path: Path) -> None:
    x, bias = torch.zeros(4, 32), torch.zeros(1, 32)
    launch = launching(ROOM)
    with ahead.noted() as kernels:
        for dtype in (torch.float32, torch.float32, torch.float16):
            launch.bias_gelu_fwd(x.to(dtype), bias.to(dtype), x.to(dtype))
    assert [(kernel.module, kernel.name) for kernel in kernels] == [
        (f"{ROOM}.kernel", "bias_gelu_fwd_kernel")
    ] * 2  # float32's and float16's
    assert triton.knobs.runtime.jit_cache_hook is None
    with pytest.raises(RuntimeError):
        torch._assert_async(torch.tensor(False))
    assert not list(tmp_path.rglob("*.cubin"))
    assert [ahead.compiled(kernel) for kernel in kernels] == [None, None]
    assert len(list(tmp_path.rglob("*.cubin"))) == 2
    assert driver.launchers == ["bias_gelu_fwd_kernel"] * 2
    launch.bias_gelu_fwd(x, bias, torch.empty_like(x))  # found: nothing is compiled again
    assert len(list(tmp_path.rglob("*.cubin"))) == 2


def test_what_does_not_compile_is_said(driver: Driver) -> None:
    kernel = ahead.Kernel(f"{ROOM}.kernel", "bias_gelu_fwd_kernel", '{"name": "another"}')
    assert "bias_gelu_fwd_kernel: RuntimeError: Specialization data is for another" in (
        ahead.compiled(kernel) or ""
    )
    assert ahead.compile_all([], 2) == []


@pytest.mark.parametrize("name", ["MDTv2_XL_2", "MDT_S_2", "DiT_S_2", "digits"])
def test_few_blocks_have_what_many_have(name: str) -> None:
    few = ahead.few_blocks(model_config(name))
    assert few.depth <= ahead.BLOCKS
    whole = {type(module) for module in ahead.providers.zoo.build_model(few).modules()}
    with torch.device("meta"):
        assert {type(m) for m in ahead.providers.zoo.build_model(model_config(name)).modules()} == whole


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ([], "--model and --batch: both are required"),
        (["--model=digits", "--batch=2", "--jobs=0"], "--jobs: got 0, expected 1 or more"),
        (
            ["--model=digits", "--batch=2", "--providers=reference"],
            "--providers: got reference, none of which",
        ),
        (["--model=digits", "--batch=2", "--repeats=2"], "unrecognized arguments: --repeats=2"),
        (["--model=digits", "--batch=2", "--device=cpu"], "--device: Triton compiles for a GPU, got cpu"),
    ],
)
def test_mistakes(options: list[str], problem: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert ahead.main(options) == 2
    assert problem in capsys.readouterr().err


@pytest.mark.gpu
def test_on_a_gpu_nothing_is_left_to_compile(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In a process of its own, as kernels loaded here would run, on arguments that were never written."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    options = ["--model=digits", "--batch=2", "--dtype=bfloat16", "--lengths=2", "--providers=fast,fast-lean"]
    subprocess.run([sys.executable, ahead.__file__, *options, "--jobs=4"], check=True)
    compiled = set(tmp_path.rglob("*.cubin"))
    assert compiled
    assert throughput.main([*options, "--repeats=1"]) == 0
    assert set(tmp_path.rglob("*.cubin")) == compiled
