"""A training step gathers each weight once for its forward and once for its backward pass."""

import pytest

from collectives import Case, Counted, count

pytestmark = pytest.mark.slow

PACKED = Case(2, 2, "fsdp", "bfloat16")
SEPARATE = Case(2, 2, "fsdp", "bfloat16", packed=False)
CHECKPOINTED = Case(2, 2, "fsdp", "bfloat16", checkpointing="full")
BLOCKS = 5  # one is the side block, called in the masked pass only


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Counted]:
    return count(tmp_path_factory.mktemp("counted"), 2, [PACKED, SEPARATE, CHECKPOINTED])


@pytest.mark.parametrize("case", [PACKED, CHECKPOINTED], ids=str)
def test_each_weight_is_gathered_once_in_each_direction(case: Case, counted: dict[str, Counted]) -> None:
    """Both passes of the objective run together; weights around the blocks stay gathered in between."""
    one = counted[str(case)]
    assert one.groups == BLOCKS + 1
    gathers = [whole for kind, whole, _ in one.passes if kind == "all_gather"]
    assert len(gathers) == BLOCKS + 1 + BLOCKS
    root, forward, backward = gathers[0], gathers[1 : BLOCKS + 1], gathers[BLOCKS + 1 :]
    assert backward == forward[::-1]  # the same weights in reverse order
    assert root not in forward
    assert one.number("reduce_scatter") == one.groups
    assert one.number("all_reduce") == 0


def test_two_separate_passes_gather_every_block_twice_as_often(counted: dict[str, Counted]) -> None:
    one, packed = counted[str(SEPARATE)], counted[str(PACKED)]
    once = packed.number("all_gather") - 1  # without the root
    assert one.number("all_gather") == 1 + 2 * once - 2  # the side block runs in one of them only
    assert one.number("reduce_scatter") == packed.number("reduce_scatter")


def test_an_update_sends_no_more_than_the_gradient_norm(counted: dict[str, Counted]) -> None:
    for one in counted.values():
        assert one.update == [("all_reduce", 8, 8)]
