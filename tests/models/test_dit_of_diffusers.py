"""Reading diffusers' DiT: nothing in its file is left out unnoticed. ``test_hub.py`` compares its outputs."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiTTransformer2DModel
from safetensors.torch import load_file, save_file

from mdt_fast import DiT, UserError
from mdt_fast.models.hub import CONFIG, WEIGHTS


def saved(folder: Path, **changes: Any) -> Path:
    """A model with one embedding for all blocks, as in conversions of published weights."""
    settings = {
        "num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "out_channels": 8,
        "num_layers": 2, "sample_size": 8, "num_embeds_ada_norm": 10,
    }  # fmt: skip
    model = DiTTransformer2DModel(**{**settings, **changes})
    first, second = model.transformer_blocks
    second.norm1.emb.load_state_dict(first.norm1.emb.state_dict())
    model.save_pretrained(folder)
    return folder


def refused(message: str, folder: Path) -> None:
    with pytest.raises(
        UserError, match=re.escape(f"weights of another model: {message}, which a DiT of its")
    ):
        DiT.from_pretrained(folder)


def test_norms_with_weights_are_refused(tmp_path: Path) -> None:
    refused("transformer_blocks.0.norm3.bias", saved(tmp_path, norm_elementwise_affine=True))


def test_blocks_that_the_config_does_not_count_are_refused(tmp_path: Path) -> None:
    values = json.loads((saved(tmp_path) / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps({**values, "num_layers": 1}))
    refused("transformer_blocks.1.attn1.to_k.bias", tmp_path)


def test_a_position_table_in_the_file_is_computed_anew(tmp_path: Path) -> None:
    state = load_file(saved(tmp_path) / WEIGHTS)
    expected = DiT.from_pretrained(tmp_path).pos_embed
    save_file({**state, "pos_embed.pos_embed": torch.zeros(1, 16, 16)}, tmp_path / WEIGHTS)
    assert torch.equal(DiT.from_pretrained(tmp_path).pos_embed, expected)
