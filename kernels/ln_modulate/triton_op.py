"""The Triton kernels as registered ops. B samples, R rows (tokens of all samples), D width, P parts."""

import torch
from torch import Tensor

from .config import launch_config
from .kernel import ln_modulate_bwd_kernel, ln_modulate_fwd_kernel


@torch.library.custom_op("mdt_fast::ln_modulate", mutates_args=())
def ln_modulate_fwd(
    x_RD: Tensor,
    y_RD: Tensor | None,
    gate_BD: Tensor | None,
    shift_BD: Tensor,
    scale_BD: Tensor,
    offsets: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Residual (empty without ``y``), modulated normal, mean [R] and 1/std [R], the last two in float32."""
    residual_RD, out_RD, mean_R, rstd_R = _outputs(x_RD, y_RD)
    (R, D), B = x_RD.shape, shift_BD.shape[0]
    if R:
        config, unused = launch_config(D, B, R // B), x_RD
        ln_modulate_fwd_kernel[(B, config.programs)](
            x_RD, unused if y_RD is None else y_RD, unused if gate_BD is None else gate_BD,
            shift_BD, scale_BD, unused if offsets is None else offsets, residual_RD, out_RD, mean_R, rstd_R,
            R // B, D, 0 if gate_BD is None else gate_BD.stride(0), shift_BD.stride(0), scale_BD.stride(0),
            eps, GATED=y_RD is not None, OFFSETS=offsets is not None, BLOCK_D=config.block_d,
            num_warps=config.num_warps,
        )  # fmt: skip
    return residual_RD, out_RD, mean_R, rstd_R


@torch.library.custom_op("mdt_fast::ln_modulate_bwd", mutates_args=())
def ln_modulate_bwd(
    x_RD: Tensor,
    y_RD: Tensor | None,
    gate_BD: Tensor | None,
    scale_BD: Tensor,
    offsets: Tensor | None,
    mean_R: Tensor,
    rstd_R: Tensor,
    dresidual_RD: Tensor | None,
    dout_RD: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, y, gate, shift, scale; ``x`` is the residual where there is a gate."""
    dx_RD, dy_RD, dgate_BD, dshift_BD, dscale_BD = _gradients(x_RD, y_RD, scale_BD)
    (R, D), B = x_RD.shape, scale_BD.shape[0]
    if not R:
        return dx_RD, dy_RD, dgate_BD.zero_(), dshift_BD.zero_(), dscale_BD.zero_()
    config, unused = launch_config(D, B, R // B), x_RD
    parts_3BPD = x_RD.new_empty(3, B, config.programs, D, dtype=torch.float32)
    ln_modulate_bwd_kernel[(B, config.programs)](
        x_RD, unused if y_RD is None else y_RD, unused if gate_BD is None else gate_BD, scale_BD,
        unused if offsets is None else offsets, mean_R, rstd_R,
        unused if dresidual_RD is None else dresidual_RD, dout_RD,
        dx_RD, dy_RD, parts_3BPD[2], parts_3BPD[0], parts_3BPD[1],
        R // B, D, 0 if gate_BD is None else gate_BD.stride(0), scale_BD.stride(0),
        GATED=y_RD is not None, OFFSETS=offsets is not None, BLOCK_D=config.block_d,
        num_warps=config.num_warps,
    )  # fmt: skip
    for i, total_BD in enumerate((dshift_BD, dscale_BD, dgate_BD)):
        if total_BD.numel():
            total_BD.copy_(parts_3BPD[i].sum(1))
    return dx_RD, dy_RD, dgate_BD, dshift_BD, dscale_BD


@ln_modulate_fwd.register_fake
def _(x_RD, y_RD, gate_BD, shift_BD, scale_BD, offsets, eps):  # type: ignore[no-untyped-def]
    return _outputs(x_RD, y_RD)


@ln_modulate_bwd.register_fake
def _(x_RD, y_RD, gate_BD, scale_BD, offsets, mean_R, rstd_R, dresidual_RD, dout_RD):  # type: ignore[no-untyped-def]
    return _gradients(x_RD, y_RD, scale_BD)


def _outputs(x_RD: Tensor, y_RD: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    R = x_RD.shape[0]
    residual_RD = x_RD.new_empty(0) if y_RD is None else torch.empty_like(x_RD)
    statistics = (x_RD.new_empty(R, dtype=torch.float32), x_RD.new_empty(R, dtype=torch.float32))
    return residual_RD, torch.empty_like(x_RD), *statistics


def _gradients(
    x_RD: Tensor, y_RD: Tensor | None, m_BD: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    gated = (x_RD.new_empty(0), m_BD.new_empty(0))
    if y_RD is not None:
        gated = (torch.empty_like(y_RD), m_BD.new_empty(m_BD.shape))
    return torch.empty_like(x_RD), *gated, m_BD.new_empty(m_BD.shape), m_BD.new_empty(m_BD.shape)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x_RD, y_RD, gate_BD, _, scale_BD, offsets, _ = inputs
    residual_RD, _, mean_R, rstd_R = output
    ctx.gated = y_RD is not None
    ctx.save_for_backward(
        residual_RD if ctx.gated else x_RD, y_RD, gate_BD, scale_BD, offsets, mean_R, rstd_R
    )


def _backward(ctx, dresidual_RD, dout_RD, _dmean, _drstd):  # type: ignore[no-untyped-def]
    x_RD, y_RD, gate_BD, scale_BD, offsets, mean_R, rstd_R = ctx.saved_tensors
    dx, dy, dgate, dshift, dscale = ln_modulate_bwd(
        x_RD, y_RD, gate_BD, scale_BD, offsets, mean_R, rstd_R,
        dresidual_RD.contiguous() if ctx.gated else None, dout_RD.contiguous(),
    )  # fmt: skip
    return dx, dy if ctx.gated else None, dgate if ctx.gated else None, dshift, dscale, None, None


ln_modulate_fwd.register_autograd(_backward, setup_context=_setup_context)
