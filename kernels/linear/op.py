"""Checks and dispatch. D input width, O output width."""

import torch
from torch import Tensor

from .. import checks
from . import onednn, reference
from .onednn import linear_fwd, worthwhile

ONEDNN = torch.backends.mkldnn.is_available()
BFLOAT16 = ONEDNN and torch.ops.mkldnn._is_mkldnn_bf16_supported()

MIN_ROWS = 64
"""Below, a product is bound by reading the weight, whoever multiplies."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias``: ``x`` [..., D], ``weight`` [O, D], ``bias`` [O] -> [..., O].

    In the dtype of ``x``, which all have (under autocast any floating dtype: it casts as for PyTorch's linear
    layer). Raises ``ValueError`` for shapes or dtypes that do not fit.
    """
    checks.floating("x", x)
    checks.shape("weight", weight, "O", x.shape[-1] if x.ndim else "D")
    weight, bias = checks.layer(x, weight, bias)
    return product(x, weight, bias)


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """:func:`linear` without its checks."""
    if not (uses_onednn(x, weight) or (bias is not None and _in_bfloat16(x, weight))):
        return reference.linear(x, weight, bias)
    return linear_fwd(x.reshape(-1, x.shape[-1]), weight, bias).view(*x.shape[:-1], weight.shape[0])


def weight_gradient(dout_RO: Tensor, x_RD: Tensor) -> Tensor:
    """``dout.T @ x``: [O, D]."""
    if uses_onednn(dout_RO, x_RD.t()) or _in_bfloat16(dout_RO, x_RD.t()):
        return onednn.weight_gradient(dout_RO, x_RD)
    return reference.linear(dout_RO.t(), x_RD.t(), None)


def input_gradient(dout_RO: Tensor, weight_OD: Tensor) -> Tensor:
    """``dout @ weight``: [R, D]."""
    return product(dout_RO, weight_OD.t())


def uses_onednn(x: Tensor, weight: Tensor) -> bool:
    """In float32 on a CPU: PyTorch asks MKL there, which leaves AVX-512 unused on processors other than
    Intel's."""
    if not x.dtype == weight.dtype == torch.float32 or torch.is_autocast_enabled("cpu"):
        return False
    return _serves(x, weight)


def _in_bfloat16(x: Tensor, weight: Tensor) -> bool:
    """Of bfloat16 on a CPU PyTorch makes a product of oneDNN's itself, but a slow one with a bias, which it
    writes first and then adds to, and of transposed operands."""
    return BFLOAT16 and x.dtype == weight.dtype == torch.bfloat16 and _serves(x, weight)


def _serves(x: Tensor, weight: Tensor) -> bool:
    if not ONEDNN or x.device.type != "cpu" or checks.plain_only():
        return False
    if x.numel() < MIN_ROWS * x.shape[-1] or x.shape[-1] == 0:
        return False
    # A graph for any number of rows must not be compiled again at the threshold: there the op itself decides.
    return torch.compiler.is_compiling() or worthwhile(x.numel(), weight.shape[0])
