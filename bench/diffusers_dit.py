"""The DiT of the diffusers library as a provider, with the same weights as all others.

Two of its settings are changed to those of the published model so that it computes the same (``norm_eps``
1e-6, frequencies ``10000^(-k/128)``), and its blocks share the weights that embed time and class, as in that
model. Each block still recomputes the embedding, because the class is written that way.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from mdt_fast import reference
from mdt_fast.config import ModelConfig
from mdt_fast.errors import UserError
from mdt_fast.models.dit_of_diffusers import AROUND, BLOCK, LABELS


def build(config: ModelConfig) -> nn.Module:
    """Build the model of ``config``. Raises ``UserError`` if it is no DiT or diffusers is not installed."""
    if config.family != "dit":
        raise UserError(f"diffusers has no {config.family}, only DiT")
    try:
        from diffusers import DiTTransformer2DModel
    except ImportError:
        raise UserError("diffusers is not installed") from None
    inner = DiTTransformer2DModel(
        num_attention_heads=config.num_heads,
        attention_head_dim=config.hidden_size // config.num_heads,
        in_channels=config.in_channels,
        out_channels=config.in_channels * (2 if config.learn_sigma else 1),
        num_layers=config.depth,
        sample_size=config.input_size,
        patch_size=config.patch_size,
        num_embeds_ada_norm=config.num_classes,
        norm_eps=1e-6,
    )
    embedding = inner.transformer_blocks[0].norm1.emb
    embedding.time_proj.downscale_freq_shift = 0
    for block in inner.transformer_blocks:
        block.norm1.emb = embedding
    return DiffusersDiT(inner, config)


class DiffusersDiT(nn.Module):
    """The diffusers model with our call signature; ``load_state_dict`` accepts our names."""

    def __init__(self, inner: nn.Module, config: ModelConfig):
        super().__init__()
        self.inner, self.config = inner, config

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return self.inner(x, t, y, return_dict=False)[0]

    def forward_with_cfg(self, x: Tensor, t: Tensor, y: Tensor, cfg_scale: float | None = None) -> Tensor:
        return reference.MDT.forward_with_cfg(self, x, t, y, cfg_scale, scale_pow=None)

    def load_state_dict(self, state: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        made = {}
        for theirs, ours in AROUND.items():
            made |= {f"{theirs}.{part}": state[f"{ours}.{part}"] for part in ("weight", "bias")}
        made[LABELS] = state["y_embedder.embedding_table.weight"]
        for i in range(self.config.depth):
            there, here = f"transformer_blocks.{i}", f"blocks.{i}"
            for part in ("weight", "bias"):
                qkv = state[f"{here}.attn.qkv.{part}"].chunk(3)
                made |= {f"{there}.attn1.to_{name}.{part}": one for name, one in zip("qkv", qkv)}
                made |= {
                    f"{there}.{theirs}.{part}": state[f"{here}.{ours}.{part}"]
                    for theirs, ours in BLOCK.items()
                }
        own = self.inner.state_dict()
        first = "transformer_blocks.0.norm1.emb."
        for name in own:  # the shared embedding under each block's name; the position table is computed
            _, found, rest = name.partition(".norm1.emb.")
            made.setdefault(name, made[first + rest] if found else own[name])
        return self.inner.load_state_dict(made, *args, **kwargs)
