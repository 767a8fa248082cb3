"""The tests of ``float8.py``, with the implementation for CPUs: plain PyTorch."""

from importlib import import_module

import pytest
import torch

from float8 import *  # noqa: F403
from float8 import layer
from mdt_fast import kernels
from mdt_fast.kernels import backends as rows_of_ops
from mdt_fast.kernels.float8 import registered
from tolerances import FLOAT32, relative_error

backends_module = import_module("mdt_fast.kernels.backends")  # the package has a function of that name


@pytest.mark.parametrize(
    ("capability", "served"),
    [((8, 0), "pytorch"), ((8, 9), "triton"), ((9, 0), "triton"), ((12, 0), "pytorch")],
    ids=str,
)
def test_which_gpus_have_it(
    capability: tuple[int, int], served: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other GPUs round and multiply with plain PyTorch, and the doctor says so."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(backends_module, "HAS_TRITON", True)
    monkeypatch.setattr(backends_module, "INTERPRETING", False)
    registered.multiplies.cache_clear()
    try:
        rows = {row.op: row for row in rows_of_ops()}
    finally:
        registered.multiplies.cache_clear()
    for op in ("quantize_rows", "quantize_weight"):
        assert rows[op].backend == served
    assert rows["ln_modulate"].backend == "triton"


def test_functional_transforms_are_exact() -> None:
    x, (weight, bias) = torch.randn(5, 32), layer(32, 16)
    rows = torch.func.vmap(lambda x: kernels.linear(x, weight, bias, float8=True))(x)
    assert relative_error(rows, kernels.linear(x, weight, bias)) < FLOAT32
