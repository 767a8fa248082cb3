"""Read diffusers' DiT as ours: it has other names, and separate queries, keys and values.

Diffusers' class differs from the published model in two places that weights cannot make up for: its
timestep frequencies are ``10000^(-k/127)`` instead of ``10000^(-k/128)``, and its second norm adds 1e-5
(``norm_eps``) instead of 1e-6. A model read here computes what was published.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import ModelConfig
from ..errors import UserError
from ..reference.embed import sincos_position_table

CLASSES = ("DiTTransformer2DModel", "Transformer2DModel")
"""Its class name, and the one it was saved under before it had its own class."""

BLOCK = {
    "attn1.to_out.0": "attn.proj",
    "ff.net.0.proj": "mlp.fc1",
    "ff.net.2": "mlp.fc2",
    "norm1.linear": "adaLN_modulation.1",
}
AROUND = {
    "pos_embed.proj": "x_embedder.proj",
    "transformer_blocks.0.norm1.emb.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "transformer_blocks.0.norm1.emb.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "proj_out_1": "final_layer.adaLN_modulation.1",
    "proj_out_2": "final_layer.linear",
}
MOST_PATCHES = 1024
"""Per side. A larger number is a mistake, and would use up all memory."""
TABLE = "pos_embed.pos_embed"
"""Computed anew; older files hold it."""
LABELS = "transformer_blocks.0.norm1.emb.class_embedder.embedding_table.weight"


def config_of_diffusers(values: Mapping[str, Any], file: Path) -> ModelConfig:
    """The configuration in a ``config.json``; ``UserError`` for any model other than DiT."""
    fixed = {"norm_type": "ada_norm_zero", "activation_fn": "gelu-approximate", "attention_bias": True}
    for name, value in fixed.items():
        if values.get(name, value) != value:
            raise UserError(f"{file}: got {name} {values[name]!r}, expected {value!r}, as in a DiT")
    heads, size = values.get("num_attention_heads", 16), values.get("attention_head_dim", 72)
    channels = values.get("in_channels", 4)
    numbers = {"num_attention_heads": heads, "attention_head_dim": size, "in_channels": channels}
    for name, value in numbers.items():
        if type(value) is not int:
            raise UserError(f"{file}: got {name} {value!r}, expected an integer")
    outputs = values.get("out_channels") or channels
    if outputs not in (channels, 2 * channels):
        raise UserError(f"{file}: got out_channels {outputs}, expected {channels} or {2 * channels}")
    return ModelConfig.of(
        "dit",
        input_size=values.get("sample_size", 32),
        patch_size=values.get("patch_size", 2),
        in_channels=channels,
        hidden_size=heads * size,
        depth=values.get("num_layers", 28),
        num_heads=heads,
        num_classes=values.get("num_embeds_ada_norm", 1000),
        learn_sigma=outputs == 2 * channels,
    )


def weights_of_diffusers(state: Mapping[str, Tensor], config: ModelConfig, file: Path) -> dict[str, Tensor]:
    """The ``state_dict`` of a ``DiTTransformer2DModel``, under the names of :class:`DiT`.

    Each block has its own copy of the embeddings, but diffusers' last layer reads only the first block's:
    the others are dropped. Raises ``UserError`` if the copies differ, if a tensor is missing, and for tensors
    that a DiT does not have.
    """
    made: dict[str, Tensor] = {}
    read = {TABLE, LABELS}

    def of(name: str) -> Tensor:
        read.add(name)
        return state[name]

    try:
        for theirs, ours in AROUND.items():
            for part in ("weight", "bias"):
                made[f"{ours}.{part}"] = of(f"{theirs}.{part}")
        made["y_embedder.embedding_table.weight"] = state[LABELS]
        for i in range(config.depth):
            there, here = f"transformer_blocks.{i}", f"blocks.{i}"
            for part in ("weight", "bias"):
                qkv = [of(f"{there}.attn1.to_{name}.{part}") for name in "qkv"]
                made[f"{here}.attn.qkv.{part}"] = torch.cat(qkv)
                for theirs, ours in BLOCK.items():
                    made[f"{here}.{ours}.{part}"] = of(f"{there}.{theirs}.{part}")
            for key in state:
                if key.startswith(f"{there}.norm1.emb."):
                    first = state[key.replace(there, "transformer_blocks.0", 1)]
                    if not torch.equal(of(key), first):
                        raise UserError(
                            f"{file}: {key} is not that of the first block; a DiT has one for all"
                        )
    except KeyError as error:
        raise UserError(f"{file}: weights of another model: no {error.args[0]}") from None
    if other := sorted(state.keys() - read):
        raise UserError(
            f"{file}: weights of another model: {other[0]}, which a DiT of its config does not have"
        )
    width = made["x_embedder.proj.weight"].shape[0]
    if width != config.hidden_size:
        raise UserError(
            f"{file}: weights of another model: hidden_size {width} instead of {config.hidden_size}"
        )
    if config.grid_size > MOST_PATCHES:  # the file holds no table to check this against
        raise UserError(
            f"{file}: sample_size is {config.input_size}: more than {MOST_PATCHES} patches a side"
        )
    table = sincos_position_table(config.hidden_size, config.grid_size)
    made["pos_embed"] = table[None].to(made["x_embedder.proj.weight"].dtype)
    return made
