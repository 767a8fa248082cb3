"""The launch choices that ``tune.py`` tries for each Triton kernel, and the calls, at published shapes, on
which they are timed.

The choices are keyword arguments of the room's ``launch_config`` (kernels/*/config.py). Kernels in ``csrc/``
are not tuned: their choices are compiled in.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from itertools import product
from math import isqrt, prod
from typing import Literal

import torch

import ops
import points
from mdt_fast.kernels import rel_attention
from mdt_fast.kernels.aot import Case
from mdt_fast.kernels.bias_gelu import registered as gelu
from mdt_fast.kernels.launches import Choice, Entry, columns, forced
from mdt_fast.kernels.ln_modulate import registered as adaln
from mdt_fast.kernels.sums.config import ANY
from ops import Maker

EACH = (8, 64)
"""Fewest and most values of a tile per thread: with fewer it has no wide loads, more do not fit into its
registers."""

HEADS = 16
"""Attention heads, as in L and XL."""

_ROWS = {"each": (4, 8, 16, 32), "programs": (512, 1024, 2048), "num_stages": (1, 2, 3)}
_UNMASK = {"each": (4, 8, 16, 32), "programs": (512, 1024, 2048, 4096)}
_MOVE = {"each": (4, 8, 16, 32)}
_GELU = {"block_r": (4, 8, 16, 32), "widest": (128, 256, 512, 1024), "num_warps": (2, 4, 8)}
_PATCH = {"block_r": (32, 64, 128), "block_d": (32, 64, 128), "num_warps": (4, 8), "num_stages": (2, 3)}
_ATTENTION = {
    "block_m": (32, 64, 128), "block_n": (32, 64, 128), "num_warps": (4, 8), "num_stages": (1, 2, 3, 4)
}  # fmt: skip
TILES = (
    ("block_m", "block_n"), ("block_r", "widest"), ("block_r", "block_d"), ("block_p", "widest"),
    ("block_o", "block_d"),
)  # fmt: skip
"""Pairs of choices that together give the size of a tile."""


@dataclass(frozen=True, kw_only=True)
class Tunable:
    """One kernel: its room, the op that launches it, the pass in which it runs, and the values that may be
    chosen. ``size_of`` maps a model's width to the size in the kernel's shape class."""

    room: str
    op: str
    mode: Literal["fwd", "bwd"]
    space: Mapping[str, tuple[int, ...]]
    size_of: Callable[[int], int] = columns

    def choices(self) -> Iterator[Choice]:
        """All choices within ``EACH``, starting with the empty one, which stands for the current choice."""
        yield {}
        for values in product(*self.space.values()):
            choice = dict(zip(self.space, values))
            for tile in TILES:
                if set(tile) <= set(choice):
                    each = prod(choice[name] for name in tile) // (32 * choice["num_warps"])
                    if not EACH[0] <= each <= EACH[1]:
                        break
            else:
                yield choice


def _both(room: str, op: str, space: Mapping[str, tuple[int, ...]]) -> dict[str, Tunable]:
    return {
        f"{op}_{mode}": Tunable(room=room, op=op, mode=mode, space=space) for mode in ("fwd", "bwd")
    }  # fmt: skip


KERNELS: dict[str, Tunable] = {
    **{
        f"rel_attention_{name}": Tunable(
            room="rel_attention", op="rel_attention", mode="fwd" if name == "fwd" else "bwd", space=_ATTENTION
        )
        for name in ("fwd", "bwd_q", "bwd_kv", "bwd_bias")
    },
    "rel_attention_bwd_gather": Tunable(
        room="rel_attention", op="rel_attention", mode="bwd",
        space={"block_m": (16, 32, 64), "num_warps": (4, 8, 16), "num_stages": (1, 2, 3)},
    ),
    **_both("ln_modulate", "ln_modulate", _ROWS),
    **_both("ln_modulate", "gate_residual_ln_modulate", _ROWS),
    **_both("ln_modulate", "gate_residual", _ROWS),
    "bias_gelu_fwd": Tunable(
        room="bias_gelu", op="bias_gelu", mode="fwd", space=_GELU, size_of=lambda D: columns(4 * D)
    ),
    "bias_gelu_bwd": Tunable(
        room="bias_gelu", op="bias_gelu", mode="bwd",
        space={
            "block_r": (4, 8, 16), "widest": (128, 256), "num_warps": (2, 4, 8),
            "programs": (1024, 4096, 16384), "num_stages": (1, 3),
        },
        size_of=lambda D: columns(4 * D),
    ),
    "sum_chunks": Tunable(
        room="sums", op="sum_rows", mode="fwd",
        space={
            "block_p": (16, 32, 64), "widest": (64, 128, 256), "programs": (512, 1024, 2048),
            "num_warps": (4, 8), "num_stages": (1, 3),
        },
        size_of=lambda D: ANY,
    ),
    "quantize_rows": Tunable(
        room="float8", op="quantize_rows", mode="fwd",
        space={"each": (8, 16, 32), "programs": (1024, 2048, 4096, 65536), "num_stages": (1, 2, 3)},
    ),
    "quantize_weight": Tunable(
        room="float8", op="quantize_weight", mode="fwd",
        space={
            "block_o": (16, 32, 64), "block_d": (64, 128, 256), "num_warps": (2, 4, 8), "row_warps": (2, 4, 8)
        },
    ),
    **_both("tokens", "unmask_tokens", _UNMASK),
    **_both("tokens", "gather_tokens", _MOVE),
    "gather_tokens_bwd": Tunable(
        room="tokens", op="gather_tokens", mode="bwd", space=_MOVE | {"block_k": (128, 256, 512)}
    ),
    **_both("tokens", "merge_tokens", _MOVE),
    "patch_embed_fwd": Tunable(
        room="patch_embed", op="patch_embed", mode="fwd", space=_PATCH,
        size_of=lambda D: columns(ops.CHANNELS * ops.PATCH**2),
    ),
    "patch_embed_bwd": Tunable(
        room="patch_embed", op="patch_embed", mode="bwd", space=_PATCH | {"programs": (512, 1024)},
        size_of=lambda D: columns(ops.CHANNELS * ops.PATCH**2),
    ),
    "cfg_step": Tunable(
        room="cfg_step", op="cfg_step", mode="fwd",
        space={"widest": (256, 512, 1024, 2048), "each": (4, 8, 16)},
        size_of=lambda D: columns(ops.CHANNELS * ops.PATCH**2 * ops.TOKENS),
    ),
}  # fmt: skip
"""All tunable kernels, by their names in ``kernels/tuned.json``."""


def cases(entry: Entry, arch: str, choice: Choice) -> list[Case]:
    """The compilations, as listed by the room, that ``choice`` (empty: the current one) must work for."""
    room = import_module(f"mdt_fast.kernels.{KERNELS[entry[0]].room}.aot")
    with forced(entry, choice) if choice else nullcontext():
        return [case for case in room.cases(arch) if case.entry == entry]


def entries(arch: str) -> list[Entry]:
    """Every (kernel, shape class) that ``aot.py`` compiles and that ``tuned.json`` may contain."""
    rooms = dict.fromkeys(tunable.room for tunable in KERNELS.values())
    found = [
        case.entry
        for room in rooms
        for case in import_module(f"mdt_fast.kernels.{room}.aot").cases(arch)
        if case.entry is not None
    ]
    return list(dict.fromkeys(found))


def calls(entry: Entry, batch: int, device: torch.device) -> dict[str, Callable[[], points.Call]]:
    """The calls on which an entry is timed, by title: the smallest and largest published widths of its class,
    and for attention all tokens and some of them. Empty if no published model has the class. TF32 entries use
    float32 calls; torch's setting decides which products are used (:func:`products`)."""
    kernel, shape = entry
    tunable, (size, kind) = KERNELS[kernel], shape.split()
    dtype = torch.bfloat16 if kind == "half" else torch.float32
    if tunable.op == "rel_attention":
        return {
            f"d={d} {what}, batch {batch}": partial(_attention, kernel, batch, d, masked, dtype, device)
            for d in (64, 72)
            for what, masked in (("all", False), ("kept", True))
            if int(size) == {64: 64, 72: 80}[d]
        }
    widths = {}  # within a class, only the smallest and largest are used
    for model, D in ops.WIDTHS.items():
        if tunable.size_of(D) == int(size):
            widths[model] = D
    models = sorted(widths, key=widths.__getitem__)
    return {
        f"{model}, batch {batch}": partial(_call, tunable, model, batch, dtype, device)
        for model in dict.fromkeys((*models[:1], *models[-1:]))
    }


@contextmanager
def products(entry: Entry) -> Iterator[None]:
    """Compute float32 products, including PyTorch's own, with or without TF32, as the entry requires."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "tf32" if entry[1].endswith("tf32") else "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def _call(tunable: Tunable, model: str, batch: int, dtype: torch.dtype, device: torch.device) -> points.Call:
    if (kernel := f"{tunable.op}_{tunable.mode}") in IN_A_STEP:
        return _in_a_step(kernel, ops.WIDTHS[model], batch, Maker(device, dtype))
    op = ops.cases(model, batch)[tunable.op]
    return _of(tunable.mode, op.fast, op.arguments(Maker(device, dtype)))


IN_A_STEP = ("ln_modulate_bwd", "gate_residual_ln_modulate_bwd", "gate_residual_bwd", "bias_gelu_bwd")
"""Kernels that a training step calls differently from the op on its own."""


def _in_a_step(kernel: str, D: int, batch: int, make: Maker) -> points.Call:
    """The call that a training step makes: rows of both passes, gradients in bfloat16, the output recomputed,
    and the residual's gradient added."""
    lengths = [ops.TOKENS] * batch + [ops.KEPT] * batch
    R, half = sum(lengths), Maker(make.device, torch.bfloat16)
    offsets = torch.tensor([0, *lengths], device=make.device).cumsum(0).int()
    if kernel == "bias_gelu_bwd":
        x, bias, dout = (make.normal(*shape, grad=False) for shape in ((R, 4 * D), (4 * D,), (R, 4 * D)))
        return lambda: gelu.bias_gelu_bwd(x, bias, dout, True)
    gate, shift, scale = half.normal(len(lengths), 3 * D, grad=False).chunk(3, dim=1)
    x, dresidual = make.normal(R, D, grad=False), make.normal(R, D, grad=False)
    y, dout = half.normal(R, D, grad=False), half.normal(R, D, grad=False)
    if kernel == "gate_residual_bwd":
        return lambda: adaln.gate_residual_bwd(y, gate, offsets, dresidual)
    gated = (y, gate) if kernel.startswith("gate") else (None, None)
    fixed = x, *gated, shift, scale, offsets
    _, _, mean, rstd = adaln.ln_modulate_fwd(*fixed, 1e-6, torch.bfloat16)
    return lambda: [
        gradient
        for gradient in adaln.ln_modulate_bwd(*fixed, mean, rstd, dresidual, dout, True)
        if gradient.numel()
    ]


def _attention(
    kernel: str, batch: int, d: int, masked: bool, dtype: torch.dtype, device: torch.device
) -> points.Call:
    H, L, make = HEADS, ops.TOKENS, Maker(device, dtype)
    M, G = ops.KEPT if masked else L, isqrt(L)
    q, k, v = (make.normal(batch, M, H, d).detach().transpose(1, 2).requires_grad_() for _ in range(3))
    table = Maker(device, torch.float32).normal((2 * G - 1) ** 2 + 3, H, std=0.5)
    pos = make.plan(batch, L, M).ids_keep if masked else None
    function = partial(
        rel_attention, grid_size=G, q_pos=pos, k_pos=pos, attention_backend="triton",
        table_grad={"rel_attention_bwd_bias": "recompute", "rel_attention_bwd_gather": "store"}.get(kernel),
    )  # fmt: skip
    return _of(KERNELS[kernel].mode, function, (q, k, v, table))


def _of(mode: str, function: Callable[..., object], arguments: tuple[object, ...]) -> points.Call:
    """A call of the forward pass, or of the backward pass alone, repeated on one autograd graph."""
    if mode == "fwd":
        return points.call_of("fwd", function, arguments)
    leaves = [a for a in arguments if isinstance(a, torch.Tensor) and a.requires_grad]
    outputs = points.outputs_of(function(*arguments))
    gradients = [points.made_up_gradient(output) for output in outputs]
    return lambda: list(torch.autograd.grad(outputs, leaves, gradients, retain_graph=True))
