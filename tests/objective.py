"""The training objective of any model: one batch for this package's, two passes for others."""

from torch import Tensor, nn

from mdt_fast.diffusion import GaussianDiffusion


def two_pass_losses(
    model: nn.Module, diffusion: GaussianDiffusion, x: Tensor, t: Tensor, y: Tensor
) -> dict[str, Tensor]:
    if getattr(model, "mask_ratio", None) is None:
        return diffusion.training_losses(model, x, t, {"y": y})
    if hasattr(model, "training_step_outputs"):
        return diffusion.two_pass_losses(model, x, t, y)
    terms = diffusion.training_losses(model, x, t, {"y": y})
    masked = diffusion.training_losses(model, x, t, {"y": y, "enable_mask": True})
    return terms | {f"m_{name}": values for name, values in masked.items()}
