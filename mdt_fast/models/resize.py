"""Convert weights for one image size to another: everything stored per grid position, or per grid offset.

G tokens along one side, L = G*G, D width, H heads.
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError
from ..reference.embed import sincos_of_positions
from ..reference.layers import relative_position_index
from .convert import shape_of

POSITIONS = ("pos_embed", "decoder_pos_embed")
TABLE, INDEX = "attn.rel_pos_bias.relative_position_bias_table", "attn.rel_pos_bias.relative_position_index"
UNUSED = 3
"""Unused rows at the end of every bias table."""


def resize_weights(state: Mapping[str, Tensor], input_size: int) -> dict[str, Tensor]:
    """The ``state_dict`` of an MDTv2, MDT or DiT, converted to inputs of ``input_size`` for fine-tuning.

    The picture keeps its extent and gets more (or fewer) tokens: a token gets the position embedding of the
    place where its centre lies, and two tokens get the bias of the distance between them. Position embeddings
    are the fixed sine-cosine table at the new places, plus the interpolated difference that was learnt on top
    of it; bias tables are interpolated (bicubic, in float64). All other tensors are passed through, and so is
    everything if the size does not change. Vision transformers (arXiv:2010.11929, section 3.2) and Swin's
    tables (arXiv:2103.14030) are resized in this way. Raises ``UserError`` for weights of another kind of
    model, and for a size that is not a multiple of the patch size.
    """
    try:
        shape = shape_of(state)
    except (KeyError, ValueError, IndexError, TypeError) as error:
        raise UserError(f"state: not weights of an MDT, MDTv2 or DiT (lacks {error})") from None
    patch, before = shape["patch_size"], shape["input_size"] // shape["patch_size"]
    if state["pos_embed"].shape[1] != before**2:
        raise UserError(f"state: {state['pos_embed'].shape[1]} tokens, expected a square number of them")
    if type(input_size) is not int or input_size < patch or input_size % patch:
        raise UserError(f"input_size: got {input_size!r}, expected multiples of the patch size, {patch}")
    after, made = input_size // patch, dict(state)
    if after == before:
        return made
    for name in made.keys() & set(POSITIONS):
        made[name] = _positions(made[name], before, after)
    for name in [name for name in made if name.endswith(TABLE)]:
        made[name] = _table(made[name], before, after)
    index = relative_position_index(after, after)
    return made | {name: index.to(made[name], copy=True) for name in made if name.endswith(INDEX)}


def _positions(embedding: Tensor, before: int, after: int) -> Tensor:
    """[1, before^2, D] -> [1, after^2, D]; token i has its centre at (i + 1/2) / G of the picture's side."""
    D, old = embedding.shape[2], np.arange(before, dtype=np.float64)
    new = (np.arange(after, dtype=np.float64) + 0.5) * (before / after) - 0.5
    fixed, there = (torch.from_numpy(sincos_of_positions(D, places)) for places in (old, new))
    learnt = (embedding[0].double().cpu() - fixed).unflatten(0, (before, before))
    return (there + _at(learnt, new).flatten(0, 1))[None].to(embedding)


def _table(table: Tensor, before: int, after: int) -> Tensor:
    """[(2*before-1)^2 + 3, H] -> [(2*after-1)^2 + 3, H]; an offset of n tokens is n / G of the side."""
    side = 2 * before - 1
    offsets = np.arange(1 - after, after) * (before / after)
    read = _at(table[:-UNUSED].double().cpu().unflatten(0, (side, side)), offsets + before - 1)
    return torch.cat([read.flatten(0, 1).to(table), table[-UNUSED:]])


def _at(grid: Tensor, places: np.ndarray) -> Tensor:
    """Interpolate a square grid [m, m, C] at every pair of ``places`` [n], counted from 0 -> [n, n, C].

    Uses cubic convolution (Keys 1981), which is exact for quadratics. Border values repeat beyond the border.
    """
    taps = np.floor(places)[:, None] + np.arange(-1, 3)
    far = np.abs(places[:, None] - taps)  # 0 to 2
    near = (1.5 * far - 2.5) * far**2 + 1
    shares = np.where(far <= 1, near, ((2.5 - 0.5 * far) * far - 4) * far + 2)
    within = torch.from_numpy(taps.clip(0, len(grid) - 1).astype(np.int64))
    weights = grid.new_zeros(len(places), len(grid)).scatter_add_(1, within, torch.from_numpy(shares))
    return torch.einsum("im,jn,mnc->ijc", weights, weights, grid)
