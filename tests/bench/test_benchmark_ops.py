"""The speed of every op at small sizes, for ``pytest --benchmark-compare``; bench/ has sizes that matter."""

from functools import cache

import pytest
import torch

import attention
import ops
import optimizers

CPU = torch.device("cpu")
WIDTH = 64


@cache
def _cases() -> dict[str, ops.Op]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ops.WIDTHS, "S", WIDTH)
        return ops.cases("S", 1)


@pytest.mark.parametrize(("op", "mode"), [(op, mode) for op, case in _cases().items() for mode in case.modes])
def test_speed_of_an_op(benchmark, op: str, mode: str) -> None:
    call = _cases()[op].prepare(mode, torch.float32, CPU)["fast"]()
    benchmark.pedantic(call, rounds=5, warmup_rounds=1)


@pytest.mark.parametrize("provider", ["fast", "eager"])
@pytest.mark.parametrize("op", optimizers.PROVIDERS)
def test_speed_of_an_optimiser_step(
    benchmark, op: str, provider: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optimizers, "shapes", lambda model: [torch.Size([WIDTH, 4 * WIDTH])] * 20)
    call = optimizers.point(op, "S").prepare(CPU)[provider]()
    benchmark.pedantic(call, rounds=5, warmup_rounds=1)


@pytest.mark.parametrize("mode", ["fwd", "fwd+bwd"])
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("head_dim", [64, 72])
@pytest.mark.parametrize("provider", ["sdpa-no-bias", "sdpa"])
def test_speed_of_attention(benchmark, provider: str, head_dim: int, masked: bool, mode: str) -> None:
    shape = {"B": 1, "H": 2, "L": 64, **({"K": 38} if masked else {}), "d": head_dim}
    call = attention.prepare(mode, torch.float32, shape, CPU)[provider]()
    benchmark.pedantic(call, rounds=5, warmup_rounds=1)
