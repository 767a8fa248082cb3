"""Models that users change: other conditioning, another MLP, dropout in adapters."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from mdt_fast import (
    MDT,
    DiffusionConfig,
    DiT,
    MDTv2,
    SampleConfig,
    SampleSwitches,
    Switches,
    UserError,
    compile_for_training,
    create_diffusion,
    reference,
    sample,
)
from mdt_fast.models.blocks import Block
from mdt_fast.models.checkpointing import draws
from mdt_fast.models.conditioning import Conditioning
from tolerances import FLOAT32, relative_error

SHAPE: dict[str, Any] = {
    "input_size": 8, "in_channels": 4, "hidden_size": 32, "depth": 4, "num_heads": 4, "num_classes": 10,
}  # fmt: skip
OF_MDT: dict[str, Any] = {"decode_layer": 2, "mask_ratio": 0.3}
FAMILIES = (MDTv2, MDT, DiT)
LATENTS = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(0))
TIMES, LABELS = torch.tensor([1, 20, 300, 900]), torch.arange(4)


def made(cls: Any = MDTv2, **changes: Any) -> Any:
    torch.manual_seed(0)
    model = cls(**{**SHAPE, **({} if issubclass(cls, DiT) else OF_MDT), **changes})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def losses(model: Any, y: Tensor = LABELS) -> dict[str, Tensor]:
    torch.manual_seed(1)
    diffusion = create_diffusion()
    if isinstance(model, DiT):
        return diffusion.training_losses(model, LATENTS, TIMES, {"y": y})
    return diffusion.two_pass_losses(model, LATENTS, TIMES, y)


def gradients(model: Any, names: str = "") -> Tensor:
    model.zero_grad()
    terms = losses(model)
    (terms["loss"] + terms.get("m_loss", torch.zeros(4))).mean().backward()
    found = [p.grad.flatten() for name, p in model.named_parameters() if p.grad is not None and names in name]
    return torch.cat(found)


class LoRA(nn.Module):
    """A low-rank update beside a layer, with dropout before it."""

    def __init__(self, layer: nn.Linear):
        super().__init__()
        self.layer, self.dropout = layer, nn.Dropout(0.3)
        self.down = nn.Linear(layer.in_features, 4, bias=False)
        self.up = nn.Linear(4, layer.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.up(self.down(self.dropout(x)))


@pytest.mark.parametrize("mode", ["selective", "full"])
@pytest.mark.parametrize("cls", FAMILIES)
def test_dropout_drops_the_same_when_it_is_computed_again(cls: type, mode: str) -> None:
    model = made(cls)
    for block in model.every_block():
        block.attn.qkv, block.mlp.fc2 = LoRA(block.attn.qkv), LoRA(block.mlp.fc2)
    expected = gradients(model, "down")
    model.set_checkpointing(mode)
    assert torch.equal(gradients(model, "down"), expected)


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_random_states_are_kept_for_what_may_draw_alone(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading a GPU's is impossible while a graph is captured."""
    model = made()
    model.set_checkpointing(mode)

    def read() -> Tensor:
        raise AssertionError("a random state was read")

    monkeypatch.setattr(torch, "get_rng_state", read)
    assert gradients(model).isfinite().all()
    model.de_blocks[0].mlp.register_forward_hook(lambda module, given, output: F.dropout(output, 0.1))
    with pytest.raises(AssertionError, match="a random state was read"):
        losses(model)


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_what_draws_in_place_of_a_forward(mode: str) -> None:
    model = made()
    for block in model.every_block():
        layer, plain = block.mlp.fc2, block.mlp.fc2.forward
        layer.forward = lambda x, plain=plain: F.dropout(plain(x), 0.3)
    expected = gradients(model)
    model.set_checkpointing(mode)
    assert torch.equal(gradients(model), expected)


def test_a_sharded_block_draws_no_more_than_another() -> None:
    """FSDP2 gives a block a new class, and hooks that move weights."""
    block = made().de_blocks[0]
    block.__class__ = type("FSDPBlock", (FSDPModule, Block), {})
    block.register_forward_pre_hook(lambda module, given: None)
    assert not draws(block)
    block.mlp.fc1 = nn.Sequential(block.mlp.fc1, nn.Dropout(0.1))
    assert draws(block)
    own = made().de_blocks[0]
    own.__class__ = type("Own", (Block,), {"__module__": "research"})
    assert draws(own)
    own.__class__ = type("FSDPOwn", (FSDPModule, type(own)), {})
    assert draws(own)


@pytest.mark.parametrize("channels", [1, 3, 4, 16])
@pytest.mark.parametrize("cls", FAMILIES)
def test_guidance_reaches_three_of_four_channels_and_else_all(cls: Any, channels: int) -> None:
    """With ``forward_with_cfg``, as in the reference model."""
    model = made(cls, in_channels=channels).eval()
    plain = getattr(reference, cls.__name__)(**model.config.kwargs()).eval()
    plain.load_state_dict(model.state_dict())
    x, t = torch.randn(2, channels, 8, 8).repeat(2, 1, 1, 1), torch.full((4,), 300)
    y = torch.tensor([1, 2, 10, 10])
    with torch.no_grad():
        out, none = (model.forward_with_cfg(x, t, y, scale, scale_pow=None) for scale in (3.0, 1.0))
        assert relative_error(out, plain.forward_with_cfg(x, t, y, 3.0, scale_pow=None)) < FLOAT32
    guided = 3 if channels == 4 else channels
    assert torch.equal(out[:2, :guided], out[2:, :guided])
    moved = (out - none)[:2, :channels].abs().amax((0, 2, 3)) > 1e-4
    assert moved.tolist() == [i < guided for i in range(channels)]


class OfTwo(MDTv2):
    """Conditioned on something other than labels."""

    extra = 1.0

    def condition(self, t: Tensor, y: Tensor, drop: bool = False) -> Conditioning:
        c = super().condition(t, y, drop).plain + self.extra
        return Conditioning(c, F.silu(c))


def test_a_condition_of_its_own_is_sampled_with() -> None:
    model, config = made(OfTwo), SampleConfig(steps=3, cfg_scale=3.0)
    drawn, one_by_one = (
        sample(model, DiffusionConfig(), [1, 2], config, switches=switches)
        for switches in (SampleSwitches(), SampleSwitches.none())
    )
    assert relative_error(drawn, one_by_one) < FLOAT32
    plain = copy.deepcopy(model)
    plain.extra = 0.0
    without = sample(plain, DiffusionConfig(), [1, 2], config)
    assert relative_error(without, drawn) > 0.1
    plain = made()
    plain.condition = model.condition  # the same weights; replaced on the instance
    assert relative_error(sample(plain, DiffusionConfig(), [1, 2], config), drawn) < FLOAT32


class OfVectors(nn.Module):
    """Embeds properties of an image, [B, 5]; dropped ones become zeros."""

    dropout_prob = 0.5

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 32)

    def drop(self, y: Tensor) -> Tensor:
        return y * (torch.rand(len(y), 1) >= self.dropout_prob)

    def forward(self, y: Tensor, train: bool) -> Tensor:
        return self.layer(y)


@pytest.mark.parametrize("cls", FAMILIES)
def test_an_embedder_of_vectors(cls: type) -> None:
    model, y = made(cls), torch.randn(4, 5)
    model.y_embedder = OfVectors()
    assert losses(model, y)["loss"].isfinite().all()
    with pytest.raises(UserError, match=r"^y: "):
        losses(model, y[:3])
    packed = losses(model.train(), y)
    model.set_switches(Switches(packed=False))
    for name, values in losses(model, y).items():
        torch.testing.assert_close(values, packed[name], rtol=1e-4, atol=1e-5)
    never = copy.deepcopy(model)
    never.y_embedder.dropout_prob = 0.0
    assert relative_error(losses(never, y)["loss"], packed["loss"]) > 1e-3
    both = torch.cat([LATENTS[:2], LATENTS[:2]]), torch.tensor([5, 5, 5, 5]), torch.cat([y[:2], 0 * y[:2]])
    model.eval()
    with torch.no_grad():
        cond, uncond = model(*both).chunk(2)
        guided = model.forward_with_cfg(*both, 3.0, scale_pow=None)
    expected = uncond + 3 * (cond - uncond)
    torch.testing.assert_close(guided[:2, :3], expected[:, :3], rtol=1e-4, atol=1e-5)


class TokenDrop(nn.Module):
    """Like the official embedder, it drops labels itself when told that it is training."""

    dropout_prob = 1.0

    def __init__(self, embedder: nn.Module):
        super().__init__()
        self.embedding_table = embedder.embedding_table

    def forward(self, y: Tensor, train: bool) -> Tensor:
        return self.embedding_table(torch.full_like(y, 10) if train else y)


def test_an_embedder_that_drops_by_itself() -> None:
    model, t, y = made(), TIMES, LABELS
    model.y_embedder = TokenDrop(model.y_embedder)
    with torch.no_grad():
        dropped = model.train()(LATENTS, t, y)
        kept = model(LATENTS, t, y, drop_labels=False)
        assert torch.equal(dropped, model.eval()(LATENTS, t, torch.full_like(y, 10)))
        assert torch.equal(kept, model(LATENTS, t, y))
    assert relative_error(dropped, kept) > 1e-3


class SwiGLU(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.both, self.out = nn.Linear(32, 128), nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.both(x).chunk(2, dim=-1)
        return self.out(F.silu(gate) * value)


@pytest.mark.parametrize("cls", FAMILIES)
def test_an_mlp_of_its_own(cls: type) -> None:
    """The same results in every mode: fused or not, packed or not, recomputed or not."""
    model = made(cls)
    for block in model.every_block():
        block.mlp = SwiGLU()
    expected = gradients(model)
    for switches in (Switches(), Switches.none()):
        model.set_switches(switches)
        assert relative_error(gradients(model), expected) < FLOAT32
    model.set_checkpointing("full")
    assert relative_error(gradients(model), expected) < FLOAT32
    drawn = sample(model, DiffusionConfig(), [1, 2], SampleConfig(steps=3))
    assert drawn.isfinite().all()


def test_modulations_by_a_layer_that_does_not_say_its_width() -> None:
    class Doubled(nn.Module):
        def __init__(self, layer: nn.Linear):
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Tensor:
            return 2 * self.layer(x)

    model, config = made(), SampleConfig(steps=2)
    for block in model.every_block():
        block.adaLN_modulation[1] = Doubled(block.adaLN_modulation[1])
    drawn, plain = (
        sample(model, DiffusionConfig(), [1, 2], config, switches=switches)
        for switches in (SampleSwitches(), SampleSwitches.none())
    )
    assert relative_error(drawn, plain) < FLOAT32


def _calls(model: nn.Module) -> list[set[str]]:
    """Records the keywords that its forward is called with from now on."""
    calls: list[set[str]] = []
    model.register_forward_pre_hook(lambda _, args, kwargs: calls.append({*kwargs}), with_kwargs=True)
    return calls


def test_what_wraps_a_model_sees_the_step() -> None:
    """All that a training step asks of a model is one call of its forward."""
    model, both = made().train(), {"x_masked", "y_masked", "mask_plan"}
    expected = losses(model)
    compiled, in_place = copy.deepcopy(model), copy.deepcopy(model)
    in_place.compile(backend="eager")
    replaced = copy.deepcopy(model)
    replaced.forward = torch.autocast("cpu", torch.bfloat16, enabled=False)(replaced.forward)
    for inner, wrapped in (
        (model, model),
        (model, torch.nn.DataParallel(model)),
        (compiled, torch.compile(compiled, backend="eager")),
        (compiled, torch.nn.DataParallel(torch.compile(compiled, backend="eager"))),
        (in_place, in_place),
        (replaced, replaced),
    ):
        calls = _calls(inner)
        for name, value in losses(wrapped).items():
            assert relative_error(value, expected[name]) < FLOAT32
        assert calls == [both]
    by_hand = copy.deepcopy(model)
    by_hand.training_step_outputs = by_hand.training_step_outputs  # as FSDP2 and compile_for_training do
    calls = _calls(by_hand)
    losses(by_hand)
    assert not calls
    losses(torch.nn.DataParallel(by_hand))  # a wrapper calls the wrapped model's forward
    assert calls == [both]
    by_hand.forward = lambda x, t, y: x
    losses(by_hand)


class HandsOn(nn.Module):
    """Hands attributes on, as FSDP1 and DeepSpeed's engine do."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.module, name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


def test_a_wrapper_that_hands_attributes_on() -> None:
    model = made().train()
    expected, calls = losses(model), _calls(model)
    assert all(torch.equal(value, expected[name]) for name, value in losses(HandsOn(model)).items())
    assert calls == [{"x_masked", "y_masked", "mask_plan"}]


def test_labels_of_both_passes_by_forward() -> None:
    model = made(class_dropout_prob=0.9).train()
    plan = model.draw_plan(4, LATENTS.device)
    given = LATENTS, TIMES, LABELS
    full, masked = model(*given, x_masked=LATENTS, mask_plan=plan, drop_labels=False)
    assert relative_error(full, model(*given, drop_labels=False)) < FLOAT32
    assert relative_error(masked, model(*given, mask_plan=plan, drop_labels=False)) < FLOAT32
    with pytest.raises(UserError, match="y_masked: goes with x_masked"):
        model(*given, y_masked=LABELS)


def test_a_forward_that_two_passes_would_not_fit_is_refused() -> None:
    class Own(MDTv2):
        def forward(self, x: Tensor, t: Tensor, y: Tensor, **kwargs: Any) -> Tensor:
            return super().forward(2 * x, t, y, **kwargs)

    with pytest.raises(
        UserError, match=r"^model: Own has a forward of its own, without the keyword x_masked"
    ):
        losses(made(Own))

    class Half(MDTv2):
        def forward(self, x: Tensor, t: Tensor, y: Tensor, *, x_masked: Any = None) -> Tensor:
            return super().forward(x, t, y)

    with pytest.raises(UserError, match=r"without the keyword y_masked or mask_plan; give it x_masked"):
        losses(made(Half))

    class One(MDTv2):
        def forward(
            self, x: Tensor, t: Tensor, y: Tensor, x_masked: Any, y_masked: Any, mask_plan: Any
        ) -> Any:
            return super().forward(x, t, y)

    with pytest.raises(UserError, match=r"^model: got \[4, 8, 8, 8\], expected both passes' outputs .*"):
        losses(made(One))
    model = made()
    model.forward = lambda x, t, y: x
    with pytest.raises(UserError, match=r"^model: MDTv2 has a replaced forward, without"):
        losses(model)


@pytest.mark.slow
def test_a_step_compiled_whole_draws_before() -> None:
    """It gets the same labels and masks as a step that is not compiled."""
    torch._dynamo.reset()
    model = made().train()
    compiled = copy.deepcopy(model)
    compile_for_training(compiled, "model", backend="aot_eager")
    torch.manual_seed(2)
    expected = model.training_step_outputs(LATENTS, LATENTS, TIMES, LABELS)
    torch.manual_seed(2)
    found = compiled.training_step_outputs(LATENTS, LATENTS, TIMES, LABELS)
    for one, other in zip(found, expected, strict=True):
        assert relative_error(one, other) < FLOAT32
