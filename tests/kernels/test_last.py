"""Results cached for the tensors last asked about: reused, and only while they are valid."""

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mdt_fast.kernels import checks
from mdt_fast.kernels.last import of_the_last


def asked() -> tuple[Any, list[Any]]:
    """A sum that records each time it is computed."""
    calls: list[Any] = []

    @of_the_last
    def total(x: Tensor, y: Tensor | None, name: str) -> int:
        calls.append(name)
        if x.numel() > 9:
            raise ValueError("too many")
        return int(x.sum()) + (0 if y is None else int(y.sum()))

    return total, calls


def test_what_was_asked_last_is_not_computed_again() -> None:
    total, calls = asked()
    x, y = torch.arange(4), torch.ones(2)
    assert [total(x, y, "a") for _ in range(3)] == [8, 8, 8]
    assert calls == ["a"]
    assert (total(x, y, "b"), total(x, None, "b"), total(x.clone(), None, "b"), total(x, y, "a")) == (
        8,
        6,
        6,
        8,
    )
    assert calls == ["a", "b", "b", "b", "a"]


def test_a_tensor_that_was_written_to_is_another() -> None:
    total, calls = asked()
    x, y = torch.arange(4), torch.ones(2)
    assert total(x, y, "a") == 8
    x[0] = 10
    assert total(x, y, "a") == 18
    y[0].fill_(5)  # through a view
    assert total(x, y, "a") == 22
    assert len(calls) == 3


def test_nothing_is_kept_alive_nor_taken_for_what_is_gone() -> None:
    total, calls = asked()
    for value in range(50):  # addresses are reused
        x = torch.full((3,), value)
        assert total(x, None, "a") == 3 * value
        del x
    assert len(calls) == 50


def test_an_answer_goes_with_its_tensors() -> None:
    made: list[Any] = []

    @of_the_last
    def doubled(x: Tensor, y: Tensor) -> Tensor:
        result = 2 * x
        made.append(weakref.ref(result))
        return result

    x, y = torch.arange(4), torch.ones(1)
    doubled(x, y)
    gc.collect()
    assert made[-1]() is not None
    del y
    gc.collect()
    assert made[-1]() is None
    y = torch.ones(1)
    assert doubled(x, y).tolist() == [0, 2, 4, 6]
    doubled(torch.arange(3), y)  # nothing else holds the first tensor
    assert made[-1]() is None
    doubled(x, y)
    assert made[-1]() is not None


def test_what_looks_at_operations_sees_them_each_time() -> None:
    ids, rows, seen = torch.tensor([[0, 5]]), torch.randn(2, 1), []

    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func)
            return func(*args, **(kwargs or {}))

    checks.token_ids("ids", ids, 6, rows)
    for _ in range(2):
        with Watching():
            checks.token_ids("ids", ids, 6, rows)
    assert seen.count(torch.ops.aten.min.default) == 2


def test_errors_and_inference_tensors_are_not_kept() -> None:
    total, calls = asked()
    large = torch.arange(10)
    for _ in range(2):
        with pytest.raises(ValueError, match="too many"):
            total(large, None, "a")
    with torch.inference_mode():
        x = torch.arange(4)
        assert [total(x, None, "b") for _ in range(2)] == [6, 6]
    assert [total(x, None, "c") for _ in range(2)] == [6, 6]
    assert calls == list("aabbcc")


def test_checks_see_what_was_changed() -> None:
    rows, offsets, ids = torch.randn(7, 4), torch.tensor([0, 3, 7], dtype=torch.int32), torch.tensor([[0, 5]])
    for _ in range(2):
        checks.offsets("offsets", offsets, rows)
        checks.token_ids("ids", ids, 6, rows)
    with pytest.raises(ValueError, match=r"offsets: runs from 0 to 7, expected 0 to 6"):
        checks.offsets("offsets", offsets, rows[:6])
    with pytest.raises(ValueError, match=r"ids: values 0..5, expected 0..4"):
        checks.token_ids("ids", ids, 5, rows)
    offsets[1] = 9
    with pytest.raises(ValueError, match=r"offsets: is not ascending"):
        checks.offsets("offsets", offsets, rows)
    ids[0, 1] = 6
    with pytest.raises(ValueError, match=r"ids: values 0..6, expected 0..5"):
        checks.token_ids("ids", ids, 6, rows)
