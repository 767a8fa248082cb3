"""Self-attention by the ``rel_attention`` kernel. B samples, L tokens, D width, H heads, d = D/H."""

from inspect import CO_VARKEYWORDS

import torch
from torch import Tensor, nn

from ..config import Switches
from ..errors import UserError
from ..kernels import rel_attention, rel_attention_qkvpacked
from ..kernels.rel_attention.config import TableGrad
from ..reference.init import init_bias_table
from ..reference.layers import relative_position_index
from .absent import WithoutOfficialParts
from .ops import apply_linear
from .own import known
from .rows import WHOLE, Rows


class RelativePositionBias(nn.Module):
    """The bias table [(2G-1)^2 + 3, H] of one layer, with the index buffer of official checkpoints.

    Calling it returns the table, so that hooks which put weights in place (offloading, pruning) run first.
    The kernel computes the index from positions. The buffer exists only for the ``state_dict``, and all
    layers of a model share one (see :func:`share_index`).
    """

    def __init__(self, grid_size: int, num_heads: int) -> None:
        super().__init__()
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * grid_size - 1) ** 2 + 3, num_heads))
        self.relative_position_index: Tensor
        self.register_buffer("relative_position_index", relative_position_index(grid_size, grid_size))
        init_bias_table(self.relative_position_bias_table)

    def forward(self) -> Tensor:
        return self.relative_position_bias_table


def share_index(model: nn.Module) -> None:
    """Make all layers of ``model`` with the same grid hold one ``relative_position_index`` tensor instead of
    one each."""
    shared: dict[torch.Size, Tensor] = {}
    for module in model.modules():
        if isinstance(module, RelativePositionBias):
            index = module.relative_position_index
            module.relative_position_index = shared.setdefault(index.shape, index)


@known
class Attention(WithoutOfficialParts):
    """Multi-head self-attention, with a relative position bias if ``grid_size`` is given (not in DiT).

    Unless something replaces or observes it, the block fuses its norm with ``qkv``, and calls
    :meth:`after_qkv`. ``rows``: those of a call that does not say them, set around it by :func:`attend`.
    """

    rows = WHOLE
    absent = "q_norm", "k_norm", "scale", "attn_drop", "proj_drop"

    def __init__(self, hidden_size: int, num_heads: int, grid_size: int | None) -> None:
        super().__init__()
        self.attention_backend = "auto"
        self.switches = Switches()
        self.num_heads = num_heads
        self.grid_size = grid_size or 0
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)
        self.rel_pos_bias = None if grid_size is None else RelativePositionBias(grid_size, num_heads)

    def forward(self, x: Tensor, ids_keep: Tensor | None = None, *, rows: Rows | None = None) -> Tensor:
        """Attend among tokens x [B, L, D], or packed rows [R, D]; ``ids_keep`` [B, K]: the positions of x [B,
        K, D]; ``rows``: the same for packed samples."""
        rows = (self.rows if rows is None else rows) if ids_keep is None else Rows(ids_keep)
        return self.after_qkv(apply_linear(self.qkv, x), rows)

    def after_qkv(self, qkv: Tensor, rows: Rows) -> Tensor:
        """Attend from ``qkv`` [B, L, 3D] to [B, L, D], or from packed rows [R, 3D] to [R, D]."""
        out = rel_attention_qkvpacked(
            qkv.unflatten(-1, (3, self.num_heads, -1)), self.table, grid_size=self.grid_size,
            pos=rows.positions, offsets=rows.offsets, max_length=rows.longest, attention_backend=self.backend,
            table_grad=self.table_grad,
        )  # fmt: skip
        return apply_linear(self.proj, out.flatten(-2))

    def chosen(self, q: Tensor, kv: Tensor, ids: Tensor) -> Tensor:
        """Attend with queries [B, N, D] of tokens ``ids`` [B, N] only, to ``kv`` [B, L, 2D] of all tokens."""
        q = q.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        k, v = kv.unflatten(-1, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        out = rel_attention(
            q, k, v, self.table, grid_size=self.grid_size, q_pos=ids, attention_backend=self.backend,
            table_grad=self.table_grad,
        )  # fmt: skip
        return apply_linear(self.proj, out.transpose(1, 2).flatten(-2))

    @property
    def table(self) -> Tensor | None:
        return None if self.rel_pos_bias is None else self.rel_pos_bias()

    @property
    def table_grad(self) -> TableGrad | None:
        return "store" if self.switches.stored_scores else None

    @property
    def backend(self) -> str:
        """The backend to use; without the fused kernel, ``auto`` means PyTorch's attention."""
        automatic = self.attention_backend == "auto"
        return "sdpa" if automatic and not self.switches.fused_attention else self.attention_backend


def _takes_rows(attn: Attention) -> bool:
    code = getattr(type(attn).forward, "__code__", None)
    if code is None or code.co_flags & CO_VARKEYWORDS:
        return code is not None
    return "rows" in code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]


def attend(attn: nn.Module, x: Tensor, rows: Rows) -> Tensor:
    """Call an attention module, of the user's or with hooks, on tokens x. In a masked pass, every
    :class:`Attention` in it is told which tokens they are. Raises ``UserError`` if there is none."""
    result: Tensor
    if rows is WHOLE:
        result = attn(x)
        return result
    inside = [module for module in attn.modules() if isinstance(module, Attention)]
    if not inside:
        raise UserError(
            f"attn: got a {type(attn).__name__}, expected an Attention or a module around one, as it has to "
            "be told which tokens a mask keeps"
        )
    # What is recomputed in the backward pass must have been given them.
    code = None if "forward" in vars(attn) else getattr(type(attn).forward, "__code__", None)
    hands_on = code is not None and code.co_flags & CO_VARKEYWORDS and all(map(_takes_rows, inside))
    for module in inside:
        module.rows = rows
    try:
        result = attn(x, rows=rows) if hands_on else attn(x)
    finally:
        for module in inside:
            module.rows = WHOLE
    return result
