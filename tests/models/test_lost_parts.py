"""What a model computes beyond its weights is not lost without a word when it is saved or converted."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mdt_fast import DiT, MDTv2, from_reference, reference
from mdt_fast.errors import UserError
from mdt_fast.models.embed import LabelEmbedder
from mdt_fast.models.ops import Float8Linear

SHAPE = {"input_size": 8, "hidden_size": 32, "depth": 4, "num_heads": 2, "num_classes": 10, "decode_layer": 2}


class OtherMlp(nn.Module):
    """Another activation under the same names."""

    def __init__(self, mlp: Any) -> None:
        super().__init__()
        self.fc1, self.fc2 = mlp.fc1, mlp.fc2

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(torch.relu(self.fc1(x)))


def other_mlp(model: Any) -> None:
    model.de_blocks[0].mlp = OtherMlp(model.de_blocks[0].mlp)


def other_activation(model: Any) -> None:
    model.en_inblocks[0].adaLN_modulation[0] = nn.Tanh()


def more_classes(model: Any) -> None:
    model.y_embedder = LabelEmbedder(20, 32, 0.1)


def more_channels(model: Any) -> None:
    model.x_embedder.proj, model.in_channels = nn.Conv2d(9, 32, 2, 2), 9


def own_forward(model: Any) -> None:
    forward = model.de_blocks[0].mlp.forward
    model.de_blocks[0].mlp.forward = lambda hidden: 2 * forward(hidden)


def other_heads(model: Any) -> None:
    model.de_blocks[0].attn.num_heads = 4


CHANGES = {
    other_mlp: r"de_blocks\.0\.mlp, a \S*OtherMlp instead of Mlp",
    other_activation: r"en_inblocks\.0\.adaLN_modulation\.0, a Tanh instead of SiLU",
    more_classes: r"y_embedder\.embedding_table\.weight of shape \[21, 32\] instead of \[11, 32\]",
    more_channels: r"x_embedder\.proj\.weight of shape \[32, 9, 2, 2\] instead of \[32, 4, 2, 2\]",
    own_forward: r"de_blocks\.0\.mlp with a forward of its own",
    other_heads: r"de_blocks\.0\.attn\.num_heads 4 instead of 2",
}


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_model_that_could_not_be_built_again_is_not_saved(
    change: Callable[[Any], None], tmp_path: Path
) -> None:
    model = MDTv2(**SHAPE)
    change(model)
    with pytest.raises(UserError, match=f"^save_pretrained: .*{CHANGES[change]}"):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_what_changes_no_output_is_saved(tmp_path: Path) -> None:
    model = MDTv2(**SHAPE)
    model.set_checkpointing("full")
    model.set_attention_backend("sdpa")
    model.y_embedder.dropout_prob = 0.0
    model.de_blocks[0].register_forward_hook(lambda *_: None)
    model.de_blocks[0].attn.qkv.__class__ = Float8Linear
    # As accelerate does where it moves weights to the GPU for each call.
    part: Any = model.de_blocks[0].mlp
    part._old_forward, part.forward = part.forward, lambda hidden: part._old_forward(hidden)
    model.save_pretrained(tmp_path)
    assert torch.equal(MDTv2.from_pretrained(tmp_path).pos_embed, model.pos_embed)


class Doubled(reference.DiT):
    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return super().forward(x, 2 * t, y)


def relu(model: Any) -> None:
    model.blocks[0].mlp.act = nn.ReLU()


def tanh(model: Any) -> None:
    model.final_layer.adaLN_modulation[0] = nn.Tanh()


def other_norm(model: Any) -> None:
    model.blocks[1].norm1 = nn.LayerNorm(32, eps=1e-3, elementwise_affine=False)


def dropout(model: Any) -> None:
    model.blocks[0].attn.proj_drop = nn.Dropout(0.1)


def hooks(model: Any) -> None:
    model.blocks[0].register_forward_hook(lambda module, args, output: 2 * output)


def replaced(model: Any) -> None:
    forward = model.forward
    model.forward = lambda *args: 2 * forward(*args)


LOST = {
    relu: r"blocks\.0\.mlp\.act is ReLU\(\), expected GELU",
    tanh: r"final_layer\.adaLN_modulation\.0 is Tanh\(\), expected SiLU",
    other_norm: r"blocks\.1\.norm1 is LayerNorm\(.*expected LayerNorm with eps=1e-06",
    dropout: r"blocks\.0\.attn\.proj_drop is Dropout\(p=0\.1.*expected nothing",
    hooks: r"blocks\.0 has hooks",
    replaced: r"DiT has a forward of its own",
}
FLAT = {key: value for key, value in SHAPE.items() if key != "decode_layer"}


@pytest.mark.parametrize("change", LOST, ids=lambda change: change.__name__)
def test_from_reference_refuses_what_is_no_weight(change: Callable[[Any], None]) -> None:
    source = reference.DiT(**FLAT)  # type: ignore[arg-type]
    change(source)
    with pytest.raises(UserError, match=f"^module: .*{LOST[change]}"):
        from_reference(source)


def test_from_reference_refuses_the_forward_of_a_derived_class() -> None:
    with pytest.raises(UserError, match=r"^module: .*Doubled has the forward of a derived class, Doubled"):
        from_reference(Doubled(**FLAT))  # type: ignore[arg-type]


def test_from_reference_of_a_fast_model_with_other_parts() -> None:
    model = MDTv2(**SHAPE)
    other_activation(model)
    with pytest.raises(UserError, match=r"^module: .*a Tanh instead of SiLU"):
        from_reference(model)
    assert isinstance(from_reference(DiT(**FLAT)), DiT)


def test_from_reference_takes_official_parts_that_do_nothing() -> None:
    source: Any = reference.DiT(**FLAT)  # type: ignore[arg-type]
    for block in source.blocks:
        block.attn.attn_drop, block.attn.q_norm = nn.Dropout(0.0), nn.Identity()
    assert isinstance(from_reference(source), DiT)
