"""Argument checks and dispatch. D input width, O output width."""

import platform
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import checks
from ..float8 import op as in_float8
from ..float8.registered import MULTIPLE, quantize_weight_fwd
from ..registry import applied, once, without_gradients
from ..rows import as_before, in_rows
from ..sums import sum_rows
from . import onednn, reference
from .onednn import linear_fwd, linear_gelu_fwd, worthwhile

ONEDNN = torch.backends.mkldnn.is_available()
BFLOAT16 = ONEDNN and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def of_intel() -> bool:
    """Whether the processor is made by Intel (known on Linux and Windows)."""
    with suppress(OSError), open("/proc/cpuinfo") as file:
        return "GenuineIntel" in file.read(1000)
    return "GenuineIntel" in platform.processor()


MKL_SUFFICES = torch.backends.mkl.is_available() and of_intel()
"""Whether PyTorch's own float32 products run at full speed: with MKL on Intel processors they do."""

MIN_ROWS = 64
"""With fewer rows, every library's product is bound by reading the weight."""


Float8 = bool | tuple[Tensor, Tensor]
"""Whether products are in float8, or the rows [O, D] and scales [O] of an already quantized weight."""
Operand = tuple[Tensor, Tensor | None]
"""A weight as the forward product takes it, [O, D], and in float8 the scales of its rows [O]."""
Kept = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]
"""A weight as saved for the input gradient; in float8, its transpose [D, O], the scales of its rows [O] and
ones [D]. The last entry is the weight itself if it is another tensor, so that a request for a second
derivative is found and refused."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, float8: Float8 = False) -> Tensor:
    """``x @ weight.T + bias``: ``x`` [..., D], ``weight`` [O, D], ``bias`` [O] -> [..., O].

    All arguments and the result have the dtype of ``x``; under autocast the arguments may have any floating
    dtype and are cast as for PyTorch's linear layer.

    With ``float8``, the operands of this product and of the one for the gradient of ``x`` are quantized to
    float8 row by row (see :func:`mdt_fast.kernels.quantize_rows`), and O and D must be multiples of 16. It
    has no effect under torch.func or in programs that torch.export makes. Without gradients, ``float8`` may
    also be the weight's rows and scales as ``quantize_weight`` returned them.

    Raises ``ValueError`` for shapes or dtypes that do not fit.
    """
    checks.floating("x", x)
    checks.columns("weight", weight, checks.width("x", x), "O")
    dtype = checks.layer(x, weight, bias)
    if (float8 is not False or (x.is_cuda and torch.is_grad_enabled())) and not checks.plain_only():
        return as_before(applied(Linear, in_rows(x), weight, bias, dtype, float8), x)
    prepared = checks.cast if not x.is_cuda or checks.plain_only() else left_to_autocast
    return product(x, prepared(weight, dtype), None if bias is None else prepared(bias, dtype))


def for_product(ctx: Any, parameter: Tensor, dtype: torch.dtype) -> Tensor:
    """A weight or bias as PyTorch's product takes it: in ``dtype``, or as it is where autocast casts it.

    On a CPU, oneDNN takes over products of which autocast does not know.
    """
    if without_gradients(ctx) and parameter.is_cuda:
        return left_to_autocast(parameter, dtype)
    return checks.cast(parameter, dtype)


def left_to_autocast(parameter: Tensor, dtype: torch.dtype) -> Tensor:
    """``parameter``, which autocast casts once for all passes within it, from the second on, until it is
    written to."""
    if parameter.dtype == dtype or not parameter.requires_grad:  # autocast keeps no casts of others
        return parameter
    if parameter.is_inference() or torch.cuda.is_current_stream_capturing():
        return parameter.to(dtype)  # a graph must not read a cast that is gone when it is replayed
    name, version = id(parameter), parameter._version
    if _versions.get(name) != version:
        torch.clear_autocast_cache()
        _versions[name] = version
    return parameter


_versions: dict[int, int] = {}
"""The versions of parameters, by id, of which autocast may have kept casts."""


def operand(ctx: Any, weight: Tensor, dtype: torch.dtype, float8: Float8) -> tuple[Operand, Kept]:
    """The weight as the forward product takes it, and as it is saved for the input gradient.

    ``ctx`` is the layer's autograd context; it tells whether gradients are needed.
    """
    if float8 is False:
        cast = for_product(ctx, weight, dtype)
        return (cast, None), (cast, None, None, None if cast is weight else weight)
    if any(size % MULTIPLE for size in weight.shape):
        raise ValueError(f"weight: shape {list(weight.shape)}, for float8 both are multiples of {MULTIPLE}")
    gradients = any(ctx.needs_input_grad)
    if float8 is True:
        rows_OD, columns_DO, scale_O, ones_D = quantize_weight_fwd(weight.contiguous(), gradients)
        return (rows_OD, scale_O), (columns_DO, scale_O, ones_D, weight)
    if not isinstance(float8, tuple) or len(float8) != 2:
        raise ValueError(f"float8: got {float8!r}, expected True, False or a weight's rows and scales")
    rows_OD, scale_O = float8
    if gradients:
        raise ValueError("float8: a weight that is rounded already is for passes without gradients")
    checks.shape("float8's rows", rows_OD, *weight.shape)
    checks.shape("float8's scales", scale_O, len(weight))
    return (rows_OD, scale_O), (weight, None, None, None)


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None, scale_O: Tensor | None = None) -> Tensor:
    """:func:`linear` without its checks; ``weight`` and ``scale_O`` are an :data:`Operand`."""
    if scale_O is not None:
        bias = None if bias is None else checks.cast(bias, x.dtype)
        return in_float8.product(x, weight, scale_O, bias, x.dtype)
    if not (uses_onednn(x, weight) or (bias is not None and _in_bfloat16(x, weight))):
        return reference.linear(x, weight, bias)
    return linear_fwd(x.reshape(-1, x.shape[-1]), weight, bias).view(*x.shape[:-1], weight.shape[0])


def gelu_epilogue(x: Tensor, weight: Tensor) -> bool:
    """Whether the product can apply GELU in its epilogue at almost no cost: with cuBLASLt on a GPU, with
    oneDNN on a CPU if the product is large enough."""
    if x.device.type != "cpu":
        return x.is_cuda
    return _onednn_knows(x.dtype) and _enough(x, weight)


def product_gelu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """GELU (tanh form) of :func:`product`, without gradients; x is [R, D].

    For half types with a bias on an NVIDIA GPU, and for large products in float32 and bfloat16 on a CPU, GELU
    is the product's epilogue, applied before the sums are rounded.
    """
    if bias is not None and x.is_cuda and torch.version.hip is None and x.element_size() == 2 and x.numel():
        bias, weight = checks.cast(bias, x.dtype), checks.cast(weight, x.dtype)
        return torch._addmm_activation(bias, x, weight.t(), use_gelu=True)
    if x.device.type == "cpu" and x.dtype == weight.dtype and _onednn_knows(x.dtype):
        return linear_gelu_fwd(x, weight, bias)
    return F.gelu(product(x, weight, bias), approximate="tanh")


def _onednn_knows(dtype: torch.dtype) -> bool:
    return ONEDNN and (dtype == torch.float32 or (BFLOAT16 and dtype == torch.bfloat16))


class Linear(torch.autograd.Function):
    """x [R, D], weight [O, D], bias [O] -> [R, O] in ``dtype``.

    The casts to ``dtype`` are in here where gradients are needed (see :func:`for_product`), so the gradients
    of weight and bias are computed directly in the parameters' own dtypes.
    """

    @staticmethod
    def forward(ctx: Any, x, weight, bias, dtype, float8):  # type: ignore[no-untyped-def]
        ctx.dtypes = x.dtype, weight.dtype, None if bias is None else bias.dtype
        x, bias = checks.cast(x, dtype), None if bias is None else for_product(ctx, bias, dtype)
        (factor, scale), kept = operand(ctx, weight, dtype, float8)
        ctx.save_for_backward(x, *kept)
        return product(x, factor, bias, scale)

    @staticmethod
    @once
    def backward(ctx: Any, dout: Tensor):  # type: ignore[no-untyped-def]
        (x, *kept, _), (x_dtype, weight_dtype, bias_dtype) = ctx.saved_tensors, ctx.dtypes
        needs, dout = ctx.needs_input_grad, dout.contiguous()
        dx, dbias = gradients(dout, kept, bias_dtype if needs[2] else None, of_input=needs[0])
        dweight = weight_gradient(dout, x, weight_dtype) if needs[1] else None
        return None if dx is None else dx.to(x_dtype), dweight, dbias, None, None


def weight_gradient(dout_RO: Tensor, x_RD: Tensor, dtype: torch.dtype) -> Tensor:
    """``dout.T @ x`` in ``dtype``: [O, D]. On a GPU, half types give float32 without rounding in between."""
    if _widens(dout_RO, dtype):
        return torch.mm(dout_RO.t(), x_RD, out_dtype=dtype)
    if uses_onednn(dout_RO, x_RD.t()) or _in_bfloat16(dout_RO, x_RD.t()):
        return onednn.weight_gradient(dout_RO, x_RD).to(dtype)
    return reference.linear(dout_RO.t(), x_RD.t(), None).to(dtype)


def weight_gradient_into(out_OD: Tensor, dout_RO: Tensor, x_RD: Tensor) -> None:
    """:func:`weight_gradient`, written into ``out``."""
    if _widens(dout_RO, out_OD.dtype):
        torch.mm(dout_RO.t(), x_RD, out_dtype=out_OD.dtype, out=out_OD)
    elif out_OD.dtype == dout_RO.dtype:
        torch.mm(dout_RO.t(), x_RD, out=out_OD)
    else:
        out_OD.copy_(dout_RO.t() @ x_RD)


def _widens(x: Tensor, dtype: torch.dtype) -> bool:
    """Whether PyTorch has a product of this tensor's dtype that writes its float32 sums as ``dtype``."""
    return x.is_cuda and torch.version.hip is None and dtype == torch.float32 and x.element_size() == 2


def input_gradient(dout_RO: Tensor, weight_OD: Tensor) -> Tensor:
    """``dout @ weight``: [R, D]."""
    if dout_RO.is_cuda:
        return torch.mm(dout_RO, weight_OD)  # F.linear on the transpose takes the host longer
    return product(dout_RO, weight_OD.t())


def gradients(
    dout_RO: Tensor, kept: Sequence[Any], bias_dtype: torch.dtype | None, *, of_input: bool = True
) -> tuple[Any, Tensor | None]:
    """Gradients of the input [R, D] (None unless ``of_input``) and of the bias [O] in ``bias_dtype`` (None if
    that is None).

    ``kept`` is the first three entries of what :func:`operand` saves.
    """
    weight, scale_O, ones_D = kept
    if of_input and scale_O is not None:
        both = in_float8.input_gradient(dout_RO, weight, scale_O, ones_D, bias_dtype)
        return both[0], None if bias_dtype is None else both[1]
    dx = input_gradient(dout_RO, weight) if of_input else None
    return dx, None if bias_dtype is None else sum_rows(dout_RO, bias_dtype)


def uses_onednn(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN serves a float32 product: on CPUs other than Intel's, where PyTorch calls MKL, which
    does not use AVX-512 on them."""
    if MKL_SUFFICES or not x.dtype == weight.dtype == torch.float32 or torch.is_autocast_enabled("cpu"):
        return False
    return _serves(x, weight)


def _in_bfloat16(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN can serve a bfloat16 product here.

    On a CPU, PyTorch itself calls oneDNN for bfloat16. But that is slow with a bias, which PyTorch writes
    first and then adds to, and with transposed operands.
    """
    return BFLOAT16 and x.dtype == weight.dtype == torch.bfloat16 and _serves(x, weight)


def _serves(x: Tensor, weight: Tensor) -> bool:
    if not ONEDNN or not x.is_cpu or checks.plain_only():
        return False
    if x.numel() < MIN_ROWS * x.shape[-1] or x.shape[-1] == 0:
        return False
    return _enough(x, weight)


def _enough(x: Tensor, weight: Tensor) -> bool:
    # A graph compiled for any number of rows must not be recompiled at the threshold: the op itself decides.
    return torch.compiler.is_compiling() or worthwhile(x.numel(), weight.shape[0])
