"""Argument checks and dispatch.

B samples, H heads, M queries, N keys, L tokens, R rows (tokens of all samples), d head size, G grid side.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import checks
from ..last import of_the_last
from . import backends
from .call import Call, Side
from .config import BIAS_FORMS, MAX_GRID, TABLE_GRADS, BiasForm, TableGrad


@dataclass(frozen=True, kw_only=True)
class _Side:
    """Argument names of the query side or the key side, used in error messages."""

    tensor: str
    pos: str
    offsets: str
    longest: str


_Q = _Side(tensor="q", pos="q_pos", offsets="q_offsets", longest="max_q")
_K = _Side(tensor="k", pos="k_pos", offsets="k_offsets", longest="max_k")
_QKV = _Side(tensor="qkv", pos="pos", offsets="offsets", longest="max_length")


def rel_attention(
    q_BHMd: Tensor,
    k_BHNd: Tensor,
    v_BHNd: Tensor,
    table_RH: Tensor | None = None,
    *,
    grid_size: int = 0,
    q_pos: Tensor | None = None,
    k_pos: Tensor | None = None,
    q_offsets: Tensor | None = None,
    k_offsets: Tensor | None = None,
    max_q: int | None = None,
    max_k: int | None = None,
    scale: float | None = None,
    attention_backend: str = "auto",
    bias_form: BiasForm | None = None,
    table_grad: TableGrad | None = None,
) -> Tensor:
    """``softmax(scale * q k^T + bias) v``, with ``bias`` looked up in a table by relative position.

    ``q`` is [B, H, M, d], ``k`` and ``v`` are [B, H, N, d], and the result is [B, H, M, d]. All three share
    one floating dtype and have stride 1 along d; the other strides are free. ``table`` is
    [(2G-1)^2 + 3, H], or None for no bias; its last three rows are never read. ``q_pos`` [B, M] and ``k_pos``
    [B, N] (int64, 0..G*G-1, distinct within a sample) give each token's position in the G x G grid; without
    them the tokens are the whole grid in order. ``scale`` None means 1/sqrt(d). A query without any key gives
    zeros.

    For a ragged batch, the samples are packed along one dimension: ``q`` is [R, H, d], the positions are [R],
    and the result is [R, H, d]. ``q_offsets`` and ``k_offsets`` are then cumulative sequence lengths
    (cu_seqlens), int32 [B + 1], ascending from 0 to R. ``max_q`` and ``max_k`` are upper bounds on the
    longest sample; on CUDA and under ``torch.compile`` they must be given. ``k_offsets`` defaults to
    ``q_offsets``, and ``max_k`` then to ``max_q``.

    ``attention_backend`` is ``auto`` (Triton on CUDA; on a CPU the faster of ``samples`` and ``sdpa``) or one
    of ``triton``, ``samples``, ``sdpa``, ``flex``, ``xformers``, ``flash_attn``. ``bias_form`` and
    ``table_grad`` select variants of the Triton kernels (see ``config.py``); None picks the default. Triton
    supports d up to 128.

    Raises ``ValueError`` for shapes, dtypes, strides or devices that do not fit, and for a backend that
    cannot serve the call; on the CPU also for positions outside the grid or repeated within a sample.

    Source: MDT (arXiv:2303.14389), section 3; the table follows BEiT (arXiv:2106.08254).
    """
    checks.floating("q", q_BHMd)
    grid_size = checks.whole(grid_size)
    ragged = q_offsets is not None
    _check_layout(q_BHMd, k_BHNd, v_BHNd, ragged)
    if ragged:
        k_offsets = q_offsets if k_offsets is None else k_offsets
    elif k_offsets is not None:
        raise ValueError("k_offsets: given without q_offsets")
    if max_k is None and k_offsets is q_offsets:
        max_k = max_q
    _check_table(table_RH, q_BHMd, grid_size, q_BHMd.shape[1])
    queries = _side(_Q, q_BHMd, q_BHMd.shape[2], q_pos, q_offsets, max_q, table_RH, grid_size)
    keys = _side(_K, k_BHNd, k_BHNd.shape[2], k_pos, k_offsets, max_k, table_RH, grid_size)
    if ragged and keys.batch != queries.batch:
        raise ValueError(f"k_offsets: {keys.batch} samples, but q_offsets has {queries.batch}")
    call = _call(queries, keys, grid_size, q_BHMd.shape[-1], scale, bias_form, table_grad)
    needs_grad = _needs_grad(q_BHMd, k_BHNd, v_BHNd, table_RH)
    backend = backends.choose(attention_backend, q_BHMd, table_RH, call, needs_grad)
    return backends.attend(backend, q_BHMd, k_BHNd, v_BHNd, table_RH, call)


def rel_attention_qkvpacked(
    qkv_BL3Hd: Tensor,
    table_RH: Tensor | None = None,
    *,
    grid_size: int = 0,
    pos: Tensor | None = None,
    offsets: Tensor | None = None,
    max_length: int | None = None,
    scale: float | None = None,
    attention_backend: str = "auto",
    bias_form: BiasForm | None = None,
    table_grad: TableGrad | None = None,
) -> Tensor:
    """Self-attention on ``qkv`` [B, L, 3, H, d], the output of one linear layer; returns [B, L, H, d].

    The gradient is one tensor shaped like ``qkv``, so nothing is split or concatenated. For a ragged batch,
    ``qkv`` is [R, 3, H, d], ``pos`` is [R], ``offsets`` are cumulative sequence lengths (cu_seqlens), int32
    [B + 1], and ``max_length`` bounds the longest sample; the result is [R, H, d]. Everything else is as for
    :func:`rel_attention`.
    """
    checks.floating("qkv", qkv_BL3Hd)
    grid_size = checks.whole(grid_size)
    ragged = offsets is not None
    if qkv_BL3Hd.ndim != 5 - ragged or qkv_BL3Hd.shape[-3] != 3:
        checks.shape("qkv", qkv_BL3Hd, *(("R", 3, "H", "d") if ragged else ("B", "L", 3, "H", "d")))
    _check_strides("qkv", qkv_BL3Hd)
    H, d = qkv_BL3Hd.shape[-2:]
    _check_table(table_RH, qkv_BL3Hd, grid_size, H)
    q = qkv_BL3Hd.select(-3, 0)
    side = _side(_QKV, qkv_BL3Hd, qkv_BL3Hd.shape[1], pos, offsets, max_length, table_RH, grid_size)
    call = _call(side, side, grid_size, d, scale, bias_form, table_grad)
    backend = backends.choose(attention_backend, q, table_RH, call, _needs_grad(qkv_BL3Hd, table_RH))
    return backends.attend_packed(backend, qkv_BL3Hd, table_RH, call)


def _call(
    queries: Side,
    keys: Side,
    grid_size: int,
    head_dim: int,
    scale: float | None,
    bias_form: BiasForm | None,
    table_grad: TableGrad | None,
) -> Call:
    for name, value, allowed in (
        ("bias_form", bias_form, BIAS_FORMS),
        ("table_grad", table_grad, TABLE_GRADS),
    ):
        if value is not None and value not in allowed:
            raise ValueError(f"{name}: got {value!r}, expected {', '.join(allowed)} or None")
    if head_dim == 0:
        raise ValueError("q: head size 0, expected 1 or more")
    scale = head_dim**-0.5 if scale is None else checks.number("scale", scale, "finite numbers or None")
    call = Call(queries=queries, keys=keys, grid_size=grid_size, scale=scale)
    if bias_form is not None:
        call = call._replace(bias_form=bias_form)
    return call if table_grad is None else call._replace(table_grad=table_grad)


def _needs_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def _check_layout(q: Tensor, k: Tensor, v: Tensor, ragged: bool) -> None:
    if ragged:
        checks.shape("q", q, "R", "H", "d")
        H, d = q.shape[1:]
        checks.shape("k", k, "R", H, d)
    else:
        checks.shape("q", q, "B", "H", "M", "d")
        B, H, _, d = q.shape
        checks.shape("k", k, B, H, "N", d)
    if not H or not d:
        raise ValueError(f"q: shape {list(q.shape)}, needs one head and one number a head or more")
    checks.shape("v", v, *k.shape)
    for name, x in (("q", q), ("k", k), ("v", v)):
        checks.alike(name, x, "q", q)
        _check_strides(name, x)


def _check_strides(name: str, x: Tensor) -> None:
    if x.shape[-1] > 1 and x.stride(-1) != 1 and x.numel():
        raise ValueError(
            f"{name}: stride {x.stride(-1)} along the head size, expected 1 (call .contiguous())"
        )


def _check_table(table_RH: Tensor | None, x: Tensor, grid_size: int, heads: int) -> None:
    if table_RH is None:
        return
    if not checks.is_integer(grid_size) or not 1 <= grid_size <= MAX_GRID:
        raise ValueError(f"grid_size: got {grid_size!r}, a table needs an integer from 1 to {MAX_GRID}")
    checks.floating_on("table", table_RH, x)
    checks.shape("table", table_RH, (2 * grid_size - 1) ** 2 + 3, heads)


def _side(
    names: _Side,
    x: Tensor,
    length: int,
    pos: Tensor | None,
    offsets: Tensor | None,
    longest: int | None,
    table_RH: Tensor | None,
    grid_size: int,
) -> Side:
    """Check queries or keys ``x``: [B, ...] with ``length`` tokens each, or packed [R, ...] with offsets."""
    longest = checks.whole(longest)
    if offsets is None:
        batch = x.shape[0]
        if longest is not None:
            raise ValueError(f"{names.longest}: given without {names.offsets}")
    else:
        checks.offsets(names.offsets, offsets, x)
        batch = len(offsets) - 1
        if checks.readable(offsets):
            most = _longest(offsets) if batch else 0
            if isinstance(longest, int) and longest < most:
                raise ValueError(
                    f"{names.longest}: got {longest}, but {names.offsets} has a sample of {most}"
                )
            longest = most if longest is None else longest
        if not checks.is_integer(longest) or longest < 0:
            raise ValueError(
                f"{names.longest}: got {longest!r}; with {names.offsets} it must be given on CUDA and under "
                "torch.compile or torch.func, and be 0 or more"
            )
        length = longest
    if table_RH is None:
        pos = None
    elif pos is not None:
        checks.shape(names.pos, pos, *((x.shape[0],) if offsets is not None else (batch, length)))
        checks.token_ids(names.pos, pos, grid_size**2, x)
        if checks.readable(pos) and (offsets is None or checks.readable(offsets)):
            _check_distinct(names.pos, pos, offsets, grid_size**2)
    elif offsets is not None or length != grid_size**2:
        what = "samples of different lengths" if offsets is not None else f"{length} tokens"
        raise ValueError(f"{names.pos}: needed for {what} (a whole grid has {grid_size**2})")
    pos = None if pos is None else pos.contiguous()
    offsets = None if offsets is None else offsets.contiguous()
    return Side(pos=pos, offsets=offsets, length=length, batch=batch)


@of_the_last
def _longest(offsets: Tensor) -> int:
    return int(offsets.diff().max())


@of_the_last
def _check_distinct(name: str, pos: Tensor, offsets: Tensor | None, positions: int) -> None:
    if offsets is None:
        samples = torch.arange(len(pos), device=pos.device)[:, None]
    else:
        samples = torch.arange(len(offsets) - 1, device=pos.device).repeat_interleave(offsets.diff())
    places = (samples * positions + pos).flatten()  # unique over the concatenated grids of all samples
    crowded = torch.bincount(places) > 1
    if crowded.any():
        i = int(crowded.nonzero()[0]) // positions
        raise ValueError(f"{name}: two tokens of sample {i} stand at one position, expected one")
