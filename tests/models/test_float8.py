"""Linear layers in float8, emulated: what is replaced, that weights stay as they are, that it learns."""

import importlib.util

import pytest
import torch

from mdt_fast import MDTv2, UserError
from mdt_fast.diffusion import create_diffusion
from mdt_fast.models.float8 import use_float8
from mdt_fast.training.objective import draw, losses_of, total_loss

pytestmark = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="needs torchao")

SHAPE = {
    "input_size": 8, "patch_size": 2, "in_channels": 1, "hidden_size": 32, "depth": 4, "num_heads": 2,
    "num_classes": 10, "mask_ratio": 0.3, "decode_layer": 2,
}  # fmt: skip


def model(**shape: int) -> MDTv2:
    torch.manual_seed(0)
    return MDTv2(**{**SHAPE, **shape})


def test_the_blocks_products_are_replaced_and_nothing_else() -> None:
    plain, converted = model(), model()
    assert use_float8(converted, emulate=True) == 5 * 4 + 3  # side block included; three have a long skip
    assert type(converted.sideblocks[0].mlp.fc1).__name__ == "Float8Linear"
    assert type(converted.sideblocks[0].adaLN_modulation[1]) is torch.nn.Linear
    assert type(converted.final_layer.linear) is torch.nn.Linear
    ours, theirs = converted.state_dict(), plain.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def losses(trained: MDTv2, steps: int) -> list[float]:
    """Of a short training on one batch of stripes."""
    diffusion = create_diffusion(min_snr_gamma=5.0)
    optimizer = torch.optim.AdamW(trained.parameters(), lr=3e-3)
    y = torch.arange(8)
    x = torch.sin(torch.arange(8)[None, None, None] * (y[:, None, None, None] + 1) / 2).expand(8, 1, 8, 8)
    found = []
    for step in range(steps):
        torch.manual_seed(step)
        draws = draw(trained, diffusion, 8, torch.device("cpu"))
        loss = total_loss(losses_of(trained, diffusion, x, y, draws))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


@pytest.mark.slow
def test_it_learns_as_float32_does() -> None:
    """80 steps, seed for seed: the last 30 losses are those of float32 within 3% on average."""
    shape = {"depth": 2, "decode_layer": 0}
    converted = model(**shape)
    use_float8(converted, emulate=True)
    exact, rounded = (torch.tensor(losses(m, 80)) for m in (model(**shape), converted))
    assert exact[-30:].mean() < 0.7 * exact[:10].mean()
    assert (rounded[-30:].mean() / exact[-30:].mean() - 1).abs() < 0.03
    assert (rounded != exact).any()


def test_refusals() -> None:
    with pytest.raises(UserError, match=r"float8: needs a GPU of compute capability 8.9 or more, .* on cpu"):
        use_float8(model())
    with pytest.raises(
        UserError, match=r"widths have to be multiples of 16; de_blocks.0.attn.proj is 24 to 24"
    ):
        use_float8(MDTv2(**{**SHAPE, "hidden_size": 24}), emulate=True)
