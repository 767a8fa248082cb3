"""Which implementation serves each op on this machine, and why."""

from dataclasses import dataclass

OPS = (
    "ln_modulate",
    "gate_residual_ln_modulate",
    "rel_attention",
    "patch_embed",
    "gather_tokens",
    "unmask_tokens",
    "bias_gelu",
    "skip_linear",
)


@dataclass(frozen=True)
class Backend:
    """One op's implementation: ``op`` its public name, ``backend`` what serves it, ``reason`` why."""

    op: str
    backend: str
    reason: str


def backends() -> list[Backend]:
    """One row per op, in the order of the data's way."""
    reason = "the PyTorch reference serves every device; this version has no Triton or CUDA kernel for it"
    detail = {"rel_attention": "scaled_dot_product_attention with the bias as its mask; " + reason}
    return [Backend(op, "pytorch", detail.get(op, reason)) for op in OPS]
