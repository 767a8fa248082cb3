"""The arithmetic of many GPUs: its bytes against real processes', its times against sums done by hand."""

import math
from collections import Counter

import pytest

from collectives import Case, Counted, count
from mdt_fast.config import ModelConfig
from mdt_fast.errors import UserError
from mdt_fast.models import flops
from mdt_fast.presets import published
from mdt_fast.training.parallelize import sharded_dim
from network import Link, Links, compute_seconds, predict, smallest_batch, step_seconds
from traffic import Collective, Layout, Ring, Step, Visit, padded, training_step

DTYPES = ("float32", "bfloat16")
CASES = {
    2: [Case(2, 2, parallel, dtype) for parallel in ("fsdp", "hybrid") for dtype in DTYPES]
    + [Case(2, 2, "fsdp", packed=False), Case(2, 1, "fsdp"), Case(2, 1, "hybrid")],
    4: [Case(4, 2, parallel, dtype) for parallel in ("fsdp", "hybrid") for dtype in DTYPES]
    + [Case(4, 2, "hybrid", "bfloat16", packed=False)],
}
SMALL = ModelConfig(input_size=8, in_channels=1, hidden_size=16, depth=4, num_heads=2, decode_layer=2)
LINKS = Links(node=Link(100e9, 2e-6), network=Link(10e9, 5e-6), call=10e-6)


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Counted]:
    found: dict[str, Counted] = {}
    for world, cases in CASES.items():
        found |= count(tmp_path_factory.mktemp("counted"), world, cases)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for cases in CASES.values() for case in cases], ids=str)
def test_bytes_are_those_of_real_processes(case: Case, counted: dict[str, Counted]) -> None:
    """Per collective; what a ring sends of a buffer follows from each process's part of it."""
    layout = Layout(case.world, case.on_node)
    step = training_step(case.config.model, layout, case.parallel, case.dtype, case.packed)  # type: ignore[arg-type]
    real = counted[str(case)]
    assert Counter((one.kind, one.bytes) for one in step.collectives) == Counter(
        (kind, whole) for kind, whole, _ in real.passes
    )
    shards = case.world if case.parallel == "fsdp" else case.on_node
    replicas = case.world // shards
    sent = 0.0
    for kind, whole, own in real.passes:
        sent += 2 * (replicas - 1) * whole / replicas if kind == "all_reduce" else (shards - 1) * own
    assert sum(step.sent) == pytest.approx(sent, rel=1e-12)


@pytest.mark.parametrize("family", ["mdtv2", "mdt", "dit"])
def test_every_parameter_is_counted_once(family: str) -> None:
    """DDP pads nothing: 16 replicas reduce the whole gradient, in float32."""
    config = published(family, "S", 2).model  # type: ignore[arg-type]
    trained = sum(p.numel() for p in flops.meta_model(config, "fast").parameters() if p.requires_grad)
    (within, between) = training_step(config, Layout(16), "ddp").sent
    assert within + between == pytest.approx(2 * 15 / 16 * 4 * trained)


@pytest.mark.parametrize(
    ("shape", "shards", "dim"),
    [
        ((1152, 4608), 512, 0),
        ((1, 256, 1152), 8, 1),
        ((1, 256, 1152), 384, 2),
        ((1, 1, 1152), 64, 2),
        ((1, 256, 1152), 512, 0),
    ],
)
def test_tables_of_one_row_are_cut_where_they_come_out_even(
    shape: tuple[int, ...], shards: int, dim: int
) -> None:
    """Cut along their single row, they would be padded to many times their size."""
    assert sharded_dim(shape, shards) == dim
    assert padded(shape, shards) == -(-shape[dim] // shards) * shards * math.prod(shape) // shape[dim]


def test_each_link_has_its_share() -> None:
    def sent(kind: str, ring: Ring) -> tuple[float, float]:
        return Collective(kind, "w", 6400, ring).sent  # type: ignore[arg-type]

    assert sent("all_gather", Ring(8, 8)) == (5600, 0)
    assert sent("reduce_scatter", Ring(16, 8)) == (5250, 750)  # 6000 in all, an eighth enters the machine
    assert sent("all_reduce", Ring(4, 1)) == (0, 9600)
    assert sent("all_reduce", Ring(1, 1)) == (0, 0)


def test_hybrid_keeps_gathers_off_the_network() -> None:
    fsdp, hybrid = (training_step(SMALL, Layout(32), mode) for mode in ("fsdp", "hybrid"))  # type: ignore[arg-type]
    assert hybrid.sent[1] < fsdp.sent[1]
    assert all(one.kind == "all_reduce" for one in hybrid.collectives if one.sent[1])


def test_a_collective_takes_its_slowest_link_and_every_hop() -> None:
    one = Collective("all_gather", "w", 16_000_000, Ring(16, 8))
    within, between = one.sent
    assert between / 10e9 > within / 100e9
    assert LINKS.seconds(one) == pytest.approx(10e-6 + 14 * 2e-6 + 1 * 5e-6 + between / 10e9)


def made_step(gather_ms: float, scatter_ms: float, blocks: int = 4) -> tuple[Step, Links]:
    """Blocks of equal work, and links on which each gather and each scatter takes the given time."""
    ring = Ring(2, 2)
    gather, scatter = (Collective(kind, "w", int(2e6 * ms), ring) for kind, ms in
                       (("all_gather", gather_ms), ("reduce_scatter", scatter_ms)))  # type: ignore[arg-type]  # fmt: skip
    visits = tuple(Visit("w", 100, gather, (scatter,)) for _ in range(blocks))
    return Step(Visit("root", 0, gather, (scatter,)), visits), Links(Link(1e9, 0), Link(1e9, 0))


def test_what_is_exposed_of_quick_links() -> None:
    """Four blocks of 3 ms forward and 6 ms backward; gathers of 1 ms, scatters of 2 ms. Exposed are the
    root's gather and the first block's, the last block's before its backward pass, and the last two scatters
    (the first block's and the root's)."""
    step, links = made_step(1, 2)
    assert step_seconds(step, links, 36e-3) == pytest.approx(36e-3 + (1 + 1) * 1e-3 + 1e-3 + (2 + 2) * 1e-3)


def test_slow_links_decide_the_time() -> None:
    """If sending takes longer than computing, a step takes as long as everything it sends."""
    step, links = made_step(50, 50)
    sent = 50e-3 * len(step.collectives)
    assert step_seconds(step, links, 36e-3) == pytest.approx(sent, rel=0.05)


def test_free_links_cost_nothing_and_more_compute_hides_more() -> None:
    step, links = made_step(0, 0)
    assert step_seconds(step, links, 36e-3) == pytest.approx(36e-3)
    efficiencies = [predict(SMALL, Layout(32), LINKS, seconds).efficiency for seconds in (1e-4, 1e-2, 1.0)]
    assert efficiencies == sorted(efficiencies)
    assert efficiencies[-1] > 0.99


def test_packed_is_no_slower_than_two_passes() -> None:
    packed, separate = (predict(SMALL, Layout(32), LINKS, 5e-4, packed=packed) for packed in (True, False))
    assert packed.step_s < separate.step_s
    assert packed.exposed_s == pytest.approx(packed.step_s - 5e-4)


@pytest.mark.parametrize("mode", ["fsdp", "hybrid", "ddp"])
def test_smallest_batch_is_the_first_that_scales(mode: str) -> None:
    options = {"mode": mode}
    batch = smallest_batch(SMALL, Layout(64), LINKS, 1e-3, **options)  # type: ignore[arg-type]
    assert batch is not None
    assert batch > 1
    below, at = (predict(SMALL, Layout(64), LINKS, n * 1e-3, **options) for n in (batch - 1, batch))  # type: ignore[arg-type]
    assert below.efficiency < 0.9 <= at.efficiency
    assert smallest_batch(SMALL, Layout(64), LINKS, 1e-9, **options) is None  # type: ignore[arg-type]
    assert smallest_batch(SMALL, Layout(1), LINKS, 1.0, **options) == 1  # type: ignore[arg-type]


def test_compute_of_an_assumed_share_of_peak() -> None:
    one = compute_seconds(SMALL, 1, 1e12, 0.5)
    assert compute_seconds(SMALL, 8, 2e12, 0.5) == pytest.approx(4 * one)


@pytest.mark.parametrize(
    ("message", "call"),
    [
        ("gpus: got 0, expected an integer, 1 or more", lambda: Layout(0)),
        ("gpus: got 2.5, expected an integer, 1 or more", lambda: Layout(2.5)),  # type: ignore[arg-type]
        ("gpus_per_node: got -8, expected an integer", lambda: Layout(8, -8)),
        ("gpus: 20 is not divisible by gpus_per_node 8; the nearest that is: 16", lambda: Layout(20)),
        ("network.bandwidth: got -1.0, expected a positive", lambda: Links(Link(1, 0), Link(-1.0, 0))),
        ("node.bandwidth: got 0, expected a positive", lambda: Links(Link(0, 0), Link(1, 0))),
        ("node.latency: got -1, expected a number of seconds", lambda: Links(Link(1, -1), Link(1, 0))),
        ("call: got nan, expected", lambda: Links(Link(1, 0), Link(1, 0), float("nan"))),
        ("mode: got 'hybird' (did you mean 'hybrid'?)", lambda: training_step(SMALL, Layout(8), "hybird")),  # type: ignore[arg-type]
        ("dtype: got 'bfloat'", lambda: training_step(SMALL, Layout(8), dtype="bfloat")),
        ("compute_s: got 0, expected a positive", lambda: predict(SMALL, Layout(8), LINKS, 0)),
        ("seconds_per_image: got -1", lambda: smallest_batch(SMALL, Layout(8), LINKS, -1)),
        ("target: got 1, expected", lambda: smallest_batch(SMALL, Layout(8), LINKS, 1.0, target=1)),
        ("mfu: got 40, expected a number above 0, up to 1", lambda: compute_seconds(SMALL, 1, 1e12, 40)),
        ("batch: got 0, expected", lambda: compute_seconds(SMALL, 0, 1e12, 0.4)),
    ],
    ids=lambda value: value.partition(",")[0] if isinstance(value, str) else "",
)  # fmt: skip
def test_nonsense_is_named(message: str, call: object) -> None:
    with pytest.raises(UserError) as error:
        call()  # type: ignore[operator]
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)
