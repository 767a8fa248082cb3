"""Counted FLOPs against the published ones, and our own count of a matmul against arithmetic."""

from dataclasses import replace

import pytest
import torch

import providers
from inputs import len_keeps
from mdt_fast.models import flops


@pytest.mark.parametrize(
    ("name", "multiply_adds"),
    [("DiT_S_2", 6.06e9), ("DiT_B_2", 23.0e9), ("DiT_L_2", 80.7e9), ("DiT_XL_2", 118.6e9)],
)
def test_forward_of_dit_is_as_published(name: str, multiply_adds: float) -> None:
    assert flops.forward(providers.model_config(name)).flops / 2 == pytest.approx(multiply_adds, rel=2e-3)


@pytest.mark.parametrize(
    ("len_keep", "gflop"), [(None, 259.0), (179, 200.0), (128, 156.0)], ids=["all", "179", "128"]
)
@pytest.mark.parametrize("implementation", ["reference", "fast"])
def test_forward_of_mdtv2_xl(len_keep: int | None, gflop: float, implementation: str) -> None:
    counted = flops.forward(providers.model_config("MDTv2_XL_2"), len_keep, implementation)
    assert counted.uncounted == ()
    assert counted.flops / 1e9 <= gflop * 1.0005
    if implementation == "reference":
        assert counted.flops / 1e9 == pytest.approx(gflop, rel=5e-4)


@pytest.mark.parametrize(
    ("name", "tflop"),
    [("MDTv2_S_2", 0.0756), ("MDTv2_B_2", 0.276), ("MDT_XL_2", 1.2455), ("MDTv2_XL_2", 1.31)],
)
def test_training_step(name: str, tflop: float) -> None:
    """The mean over the kept lengths that a step draws; three of them determine its parabola."""
    config = providers.model_config(name)
    lengths = (128, 153, 179) if config.family == "mdtv2" else (179,)
    counted = [flops.train_step(config, length).flops / 1e12 for length in lengths]
    mean = counted[0] if len(counted) == 1 else sum(counted[i] * w for i, w in enumerate(_weights(lengths)))
    assert mean == pytest.approx(tflop, rel=2e-3)


def _weights(lengths: tuple[int, ...]) -> list[float]:
    """Weights of three samples of a parabola for its mean over K = 128..178 (each 5/256) and 179 (1/256)."""
    weights = []
    for i, own in enumerate(lengths):
        others = [k for j, k in enumerate(lengths) if j != i]
        value = 0.0
        for K in range(128, 180):
            share = 5 / 256 if K < 179 else 1 / 256
            value += share * (K - others[0]) * (K - others[1]) / ((own - others[0]) * (own - others[1]))
        weights.append(value)
    return weights


@pytest.mark.parametrize("implementation", ["reference", "fast"])
@pytest.mark.parametrize(
    ("name", "depth", "decode_layer"),
    [
        ("MDTv2_XL_2", 14, 4),
        ("MDTv2_XL_2", 13, 0),
        ("MDTv2_XL_2", 13, 2),
        ("MDT_XL_2", 13, 1),
        ("DiT_XL_2", 13, 0),
    ],
)
def test_a_deep_model_is_counted_by_few_blocks(
    name: str, depth: int, decode_layer: int, implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(
        providers.model_config(name), depth=depth, decode_layer=decode_layer, hidden_size=64, num_heads=2
    )
    kept = None if name.startswith("DiT") else 40
    counts = {
        flops.forward: (kept, implementation),
        flops.train_step: (kept, implementation, 2),
        flops.sample_step: (implementation,),
    }
    short = [call(config, *args) for call, args in counts.items()]
    for call in counts:
        call.cache_clear()
    monkeypatch.setattr(flops, "DEEP", depth)
    assert [call(config, *args) for call, args in counts.items()] == short


def test_sampling_is_two_forward_passes() -> None:
    config = providers.model_config("MDTv2_S_2")
    assert flops.sample_step(config).flops == 2 * flops.forward(config).flops


def test_a_matmul_with_its_backward() -> None:
    a, b = (torch.zeros(3, 3, requires_grad=True) for _ in range(2))
    assert flops.count(lambda: (a @ b).sum().backward()).flops == 3 * 2 * 27


def test_an_op_of_ours_without_a_formula_is_named() -> None:
    with torch.library._scoped_library("mdt_fast", "FRAGMENT") as library:
        library.define("bench_test_double(Tensor x) -> Tensor")
        library.impl("bench_test_double", lambda x: x + x, "CompositeExplicitAutograd")
        counted = flops.count(lambda: torch.ops.mdt_fast.bench_test_double(torch.ones(2)))
    assert counted.uncounted == ("mdt_fast.bench_test_double",)


def test_kept_lengths_have_the_mean_of_random_ones() -> None:
    config = providers.model_config("MDTv2_XL_2")
    lengths = len_keeps(config, 15)
    assert len(set(lengths)) == 15
    assert min(lengths) >= 128
    assert max(lengths) <= 179
    assert sum(lengths) / 15 == pytest.approx(153.1, abs=0.6)
    assert set(len_keeps(providers.model_config("MDT_XL_2"), 4)) == {179}
    assert len_keeps(providers.model_config("DiT_XL_2"), 2) == [None, None]
