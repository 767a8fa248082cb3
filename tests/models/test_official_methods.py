"""Methods under their official names, in subclasses of the models and of their embedder of labels."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mdt_fast import MDT, DiT, MDTv2, create_diffusion
from mdt_fast.config import Switches
from mdt_fast.errors import UserError
from mdt_fast.models.blocks import Block
from mdt_fast.reference.embed import LabelEmbedder
from mdt_fast.training.step import TrainingStep
from tolerances import FLOAT32, relative_error

SHAPE: dict[str, Any] = {
    "input_size": 8, "hidden_size": 32, "depth": 4, "num_heads": 4, "num_classes": 10,
    "decode_layer": 2, "mask_ratio": 0.3,
}  # fmt: skip
X, T, Y = torch.randn(4, 4, 8, 8), torch.tensor([1, 20, 300, 900]), torch.arange(4)


def made(cls: Any = MDTv2) -> Any:
    torch.manual_seed(0)
    model = cls(**SHAPE)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.15)
    return model.train()


@pytest.mark.parametrize("name", ["random_masking", "forward_side_interpolater"])
@pytest.mark.parametrize("cls", [MDT, MDTv2])
def test_methods_that_the_model_does_not_call_are_named(cls: Any, name: str) -> None:
    def method(self: Any, *args: Any) -> Any:
        return args

    with pytest.warns(
        match=rf"^{name}: Mine defines it, but the model does not call it; override (draw|join)"
    ):
        type("Mine", (cls,), {name: method})
    mixin = type("Mixin", (), {name: method})
    with pytest.warns(match=rf"^{name}: Mixed defines it"):
        type("Mixed", (mixin, cls), {})


def test_a_method_that_a_forward_of_its_own_calls() -> None:
    class Mine(MDT):
        def random_masking(self, x: Tensor) -> Tensor:
            return x * 0

        def forward(self, x: Tensor, t: Tensor, y: Tensor, *args: Any, **kwargs: Any) -> Any:
            return self.random_masking(super().forward(x, t, y, *args, **kwargs))

    assert not made(Mine)(X, T, Y).any()


def test_initial_weights_and_patches_of_its_own() -> None:
    class Mine(DiT):
        def initialize_weights(self) -> None:
            super().initialize_weights()
            nn.init.constant_(self.final_layer.linear.bias, 0.5)

        def unpatchify(self, x: Tensor) -> Tensor:
            return 2 * super().unpatchify(x)

    torch.manual_seed(0)
    model = Mine(input_size=8, hidden_size=32, depth=2, num_heads=2)
    assert torch.equal(model(X, T, Y), torch.ones(4, 8, 8, 8))


class Dropping(LabelEmbedder):
    def token_drop(self, labels: Tensor, force_drop_ids: Tensor | None = None) -> Tensor:
        return torch.full_like(labels, self.num_classes)


class Telling(LabelEmbedder):
    def forward(self, labels: Tensor, train: bool, force_drop_ids: Tensor | None = None) -> Tensor:
        labels = torch.full_like(labels, self.num_classes) if train else labels
        return super().forward(labels, False, force_drop_ids)


class Official(nn.Module):
    """As the official one: it has no method ``drop``."""

    def __init__(self, num_classes: int, width: int, dropout_prob: float):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, width)
        self.num_classes, self.dropout_prob = num_classes, dropout_prob

    def token_drop(self, labels: Tensor) -> Tensor:
        return torch.full_like(labels, self.num_classes)

    def forward(self, labels: Tensor, train: bool) -> Tensor:
        return self.embedding_table(self.token_drop(labels) if train and self.dropout_prob > 0 else labels)


EMBEDDERS = [Dropping, Telling, Official]


@pytest.mark.parametrize("embedder", EMBEDDERS)
@pytest.mark.parametrize("packed", [True, False])
def test_an_embedders_own_drops_in_all_passes(embedder: Any, packed: bool) -> None:
    model = made()
    model.y_embedder = embedder(10, 32, 0.1)
    model.set_switches(Switches(packed=packed))
    seen: list[Tensor] = []
    model.y_embedder.embedding_table.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    diffusion = create_diffusion("")

    def labels_of(run: Any) -> set[int]:
        seen.clear()
        run()
        return set(torch.cat(seen).tolist())

    model_steps = {
        "forward": lambda: model(X, T, Y),
        "both": lambda: model.training_step_outputs(X, X, T, Y),
        "two_pass_losses": lambda: diffusion.two_pass_losses(model, X, T, Y),
        "wrapped": lambda: diffusion.two_pass_losses(nn.DataParallel(model), X, T, Y),
        "training_losses": lambda: diffusion.training_losses(model, X, T, {"y": Y}),
    }
    assert {name: labels_of(run) for name, run in model_steps.items()} == {key: {10} for key in model_steps}
    assert labels_of(lambda: diffusion.two_pass_losses(model, X, T, Y, Y)) == {0, 1, 2, 3}
    assert labels_of(lambda: model(X, T, Y, drop_labels=False)) == {0, 1, 2, 3}
    model.eval()
    assert labels_of(lambda: diffusion.two_pass_losses(model, X, T, Y)) == {0, 1, 2, 3}


def test_an_embedders_own_drops_in_a_training_step() -> None:
    model, seen = made(), []
    model.y_embedder = Dropping(10, 32, 0.1)
    model.y_embedder.embedding_table.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    TrainingStep(model, create_diffusion(""))(X, Y)
    assert set(torch.cat(seen).tolist()) == {10}
    for embedder in (Telling, Official):
        model.y_embedder = embedder(10, 32, 0.1)
        with pytest.raises(UserError, match="which drops labels in its own forward"):
            TrainingStep(model, create_diffusion(""))


def test_the_same_labels_are_dropped_as_before() -> None:
    found = []
    for embedder in (LabelEmbedder, type("Same", (LabelEmbedder,), {})):
        model = made()
        model.y_embedder = embedder(10, 32, 0.5)
        model.y_embedder.embedding_table.weight.data.copy_(torch.linspace(-1, 1, 11 * 32).view(11, 32))
        torch.manual_seed(3)
        found.append(torch.cat([*model.training_step_outputs(X, X, T, Y)]))
    assert relative_error(*found) < FLOAT32


ABSENT = [
    *(f"blocks.0.{name}" for name in ("norm1", "norm2", "mlp.act", "mlp.drop")),
    *(f"blocks.1.attn.{name}" for name in ("q_norm", "k_norm", "scale", "attn_drop", "proj_drop")),
    "final_layer.norm_final", "x_embedder.norm",
]  # fmt: skip


@pytest.mark.parametrize("path", ABSENT)
def test_official_parts_that_nothing_would_use(path: str) -> None:
    model = DiT(input_size=8, hidden_size=32, depth=2, num_heads=2)
    owner, _, name = path.rpartition(".")
    module: Any = model.get_submodule(owner)
    value: Any = 0.1 if name == "scale" else nn.LayerNorm(32)
    with pytest.raises(
        UserError, match=rf"^{name}: got a (float|LayerNorm), .* would not use; expected .*own_m"
    ):
        setattr(module, name, value)
    if name != "scale":
        setattr(module, name, nn.Identity())
    module.forward = module.forward
    setattr(module, name, value)


def test_a_subclass_may_have_official_parts() -> None:
    class Normed(Block):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self.norm1 = nn.RMSNorm(32)

        def forward(self, x: Tensor, c: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            return super().forward(self.norm1(x), c, *args, **kwargs)

    model = DiT(input_size=8, hidden_size=32, depth=2, num_heads=2)
    model.blocks[0] = Normed(32, 2, 4.0, None)
    assert model(X, T, Y).shape == (4, 8, 8, 8)
