"""MaskPlan: what it keeps, and what it refuses."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mdt_fast import MaskPlan, UserError
from mdt_fast.masking import draw_len_keep, len_keeps


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 5), st.integers(1, 70), st.integers(0, 2**31))
def test_a_plan_is_a_permutation(batch: int, tokens: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    len_keep = int(torch.randint(0, tokens + 1, (), generator=generator))
    noise = torch.randint(0, 5, (batch, tokens), generator=generator) / 5  # many ties
    for plan in (MaskPlan.from_noise(noise, len_keep), MaskPlan.from_noise(noise, len_keep).sorted()):
        ids = torch.cat([plan.ids_keep, plan.ids_mask], dim=1)
        assert torch.equal(ids.sort(dim=1).values, torch.arange(tokens).expand(batch, tokens))
        assert torch.equal(ids.gather(1, plan.ids_restore), torch.arange(tokens).expand(batch, tokens))
        assert torch.equal(plan.mask.gather(1, plan.ids_keep), torch.zeros(batch, len_keep))
        assert (plan.batch, plan.num_tokens, plan.len_keep) == (batch, tokens, len_keep)
        worst_kept = noise.gather(1, plan.ids_keep).amax(1) if len_keep else torch.full((batch,), -1.0)
        best_dropped = noise.gather(1, plan.ids_mask).amin(1) if len_keep < tokens else torch.ones(batch)
        assert (worst_kept <= best_dropped).all()


def test_the_ratio_is_drawn_before_the_noise_from_the_default_generator() -> None:
    torch.manual_seed(3)
    plan = MaskPlan.draw(2, 256, 0.3, random_ratio=True)
    torch.manual_seed(3)
    len_keep = int(256 * (1 - (torch.rand(1) * 0.2 + 0.3)))
    assert plan.len_keep == len_keep
    assert torch.equal(plan.ids_keep, torch.argsort(torch.rand(2, 256), dim=1)[:, :len_keep])


def test_lengths_at_256_tokens() -> None:
    lengths = {draw_len_keep(256, 0.3) for _ in range(5000)}
    assert min(lengths) == 128
    assert max(lengths) in (178, 179)
    assert len(lengths) in (51, 52)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: MaskPlan.from_noise(torch.rand(2, 4), 5), "len_keep: got 5, expected 0..4"),
        (lambda: MaskPlan.from_noise(torch.rand(2, 4), -1), "len_keep: got -1"),
        (lambda: MaskPlan.from_noise(torch.rand(2, 4), 2.0), "len_keep: got 2.0, expected an integer"),
        (lambda: MaskPlan.from_noise(torch.rand(2, 4), True), "len_keep: got True, expected an integer"),
        (lambda: MaskPlan.from_noise(torch.rand(2, 4), "2"), "len_keep: got '2', expected an integer"),
        (lambda: MaskPlan.from_noise([[0.1]], 1), r"noise: got a list, expected floats \[batch, tokens\]"),
        (lambda: MaskPlan.from_keep(torch.tensor([[0]]), 4.0), r"num_tokens: got 4\.0, expected an integer"),
        (lambda: MaskPlan.from_keep(torch.tensor([[0]]), -1), "num_tokens: got -1, expected an integer of 0"),
        (lambda: MaskPlan.draw(-1, 4, 0.3, random_ratio=False), "batch: got -1, expected an integer of 0"),
        (lambda: MaskPlan.draw(1, 4, "a", random_ratio=False), "mask_ratio: got 'a', expected 0..1"),
        (
            lambda: MaskPlan.from_noise(torch.rand(4), 2),
            r"noise: got torch.float32 \[4\], expected floats \[batch, tokens\]",
        ),
        (
            lambda: MaskPlan.from_noise(torch.ones(2, 4, dtype=torch.int64), 2),
            r"noise: got torch.int64 .*, expected floats",
        ),
        (lambda: MaskPlan.from_noise(torch.full((1, 4), torch.nan), 2), "noise: has NaN values"),
        (lambda: MaskPlan.from_keep(torch.tensor([[0, 4]]), 4), "ids_keep: values 0..4, expected 0..3"),
        (
            lambda: MaskPlan.from_keep(torch.tensor([[1, 1]]), 4),
            "ids_keep: a row has the same token number twice",
        ),
        (lambda: MaskPlan.from_keep(torch.tensor([[0.0]]), 4), "ids_keep: got .*, expected int64"),
        (lambda: MaskPlan.from_keep([[0]], 4), r"ids_keep: got a list, expected int64 \[batch, kept\]"),
        (lambda: MaskPlan.from_mask([[True]]), r"mask: got a list, expected bool \[batch, tokens\]"),
        (lambda: MaskPlan.from_mask(torch.ones(2, 4)), r"mask: got torch.float32 \[2, 4\], expected bool .*"),
        (lambda: MaskPlan.from_mask(torch.ones(3, 3).tril().bool()), "mask: drops 1 to 3 tokens of a sample"),
    ],
)
def test_refusals(call: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        call()  # type: ignore[operator]


@pytest.mark.parametrize(("tokens", "ratio"), [(256, 0.3), (16, 0.3), (1024, 0.5), (4, 0.1)])
def test_all_numbers_of_kept_tokens(tokens: int, ratio: float) -> None:
    torch.manual_seed(0)
    drawn = {draw_len_keep(tokens, ratio) for _ in range(3000)}
    known = set(len_keeps(tokens, ratio))
    assert drawn <= known
    assert len(known - drawn) <= 1  # the lower end itself has probability zero
    assert len(len_keeps(256, 0.3)) == 52


def test_lengths_are_drawn_on_the_host_whatever_the_default_device() -> None:
    torch.manual_seed(0)
    expected = draw_len_keep(256, 0.3), len_keeps(256, 0.3)
    torch.manual_seed(0)
    with torch.device("meta"):
        assert (draw_len_keep(256, 0.3), len_keeps(256, 0.3)) == expected


def test_lengths_follow_each_other_in_one_graph() -> None:
    """On a device whose values cannot be read; at the second length the dimension becomes dynamic."""
    torch._dynamo.reset()
    plan = torch.compile(
        lambda noise, K: MaskPlan.from_noise(noise, K).ids_keep, fullgraph=True, backend="eager"
    )
    noise = torch.rand(2, 9, device="meta")
    assert [plan(noise, K).shape[1] for K in (5, 6, 7)] == [5, 6, 7]


@pytest.mark.parametrize("ratio", [-0.1, 0.81, 0.95, 1, float("nan")])
def test_ratios_that_could_reach_beyond_1(ratio: float) -> None:
    """Refused before the draw, whatever is drawn."""
    state = torch.get_rng_state()
    with pytest.raises(UserError, match=rf"^mask_ratio: got {ratio}, expected 0\.\.0\.8"):
        draw_len_keep(256, ratio)
    if 0 <= ratio <= 1:
        with pytest.raises(UserError, match=rf"^mask_ratio: got {ratio}, expected 0\.\.0\.8"):
            MaskPlan.draw(2, 256, ratio, random_ratio=True)
        assert MaskPlan.draw(2, 256, ratio, random_ratio=False).len_keep == int(256 * (1 - ratio))
        torch.set_rng_state(state)
    assert torch.equal(torch.get_rng_state(), state)
    assert len_keeps(256, 0.8).start == 0
    assert draw_len_keep(256, 0.8) in len_keeps(256, 0.8)
